"""The grouped matrix product by kernels for TPUs."""

import dataclasses

import jax
from jax._src import config as jax_config
import jax.numpy as jnp

from llm_jax.kernels.grouped_matmul import blocks as blocks_lib
from llm_jax.kernels.grouped_matmul import gradient
from llm_jax.kernels.grouped_matmul import product
from llm_jax.kernels.grouped_matmul import stream
from llm_jax.kernels.grouped_matmul import visits as visits_lib

_LANES = 128


@dataclasses.dataclass(frozen=True)
class Pallas:
    """An `op.Local`. Shapes that are no multiples of 128 are padded, which copies them.

    Attributes:
      device_kind: what the kernels are for; interpreted for a "cpu".
      blocks: sizes of all kernels; None: each takes those of `blocks.py`.
    """

    device_kind: str
    blocks: blocks_lib.Blocks | None = None

    def product(self, x_RD, w_EDF, sizes_E, is_transposed):
        """As `op.Local`."""
        width = w_EDF.shape[1 if is_transposed else 2]
        padded = _padded(x_RD, 0), _padded(w_EDF, 1)
        (R, D), wide = padded[0].shape, padded[1].shape[1 if is_transposed else 2]
        blocks = self.blocks or blocks_lib.for_product(
            self.device_kind, R, D, wide, x_RD.dtype, is_transposed=is_transposed
        )
        static = self._static(blocks, -(-wide // blocks.columns), is_transposed)

        def run(x_RD, w_EDF, sizes_E):
            visits = visits_lib.make(sizes_E, R, blocks.ring, of_all_groups=False)
            return product.product(x_RD, w_EDF, visits, static=static, **self._how())

        y_RF = self._run(run, *padded, sizes_E)
        return y_RF[: x_RD.shape[0], :width]

    def weight_gradient(self, x_RD, dy_RF, sizes_E):
        """As `op.Local`."""
        padded = _padded(x_RD, 0), _padded(dy_RF, 0)
        (R, D), F, E = padded[0].shape, padded[1].shape[1], sizes_E.shape[0]
        blocks = self.blocks or blocks_lib.for_gradient(self.device_kind, R, D, F, x_RD.dtype)
        passes = -(-D // blocks.depth) * -(-F // blocks.columns)
        static = self._static(blocks, passes)

        def run(x_RD, dy_RF, sizes_E):
            visits = visits_lib.make(sizes_E, R, blocks.ring, of_all_groups=True)
            return gradient.weight_gradient(x_RD, dy_RF, visits, E, static=static, **self._how())

        dw_EDF = self._run(run, *padded, sizes_E)
        return dw_EDF[:, : x_RD.shape[1], : dy_RF.shape[1]]

    def _static(self, blocks, passes: int, is_transposed: bool = False) -> stream.Static:
        cores = blocks_lib.device(self.device_kind).cores
        return stream.Static(blocks, -(-passes // cores), cores, is_transposed)

    def _how(self) -> dict:
        vmem_limit = blocks_lib.device(self.device_kind).vmem_limit
        return {"vmem_limit": vmem_limit, "interpret": self.device_kind == "cpu"}

    def _run(self, run, *arrays):
        """Calls `run`; interpreted, without the check of what varies over which axes of the mesh.

        JAX's interpreter of kernels fails under that check, for its own counters do not vary.
        """
        axes = jax.typeof(arrays[0]).manual_axis_type.varying
        if self.device_kind != "cpu" or not axes:
            return run(*arrays)
        with jax_config._check_vma(False):
            # What comes of an operation varies over none.
            result = run(*(array + jnp.zeros((), array.dtype) for array in arrays))
        return jax.lax.pcast(result, tuple(axes), to="varying")


def _padded(array: jax.Array, first_dim: int) -> jax.Array:
    """Returns the array with zeros behind it, up to multiples of 128 from a dimension on."""
    missing = [
        (0, -size % _LANES if dim >= first_dim else 0) for dim, size in enumerate(array.shape)
    ]
    return jnp.pad(array, missing) if any(after for _, after in missing) else array
