"""One signature for every implementation of the grouped matrix product."""

import functools
import logging
from typing import Protocol

import jax
import jax.numpy as jnp

from llm_jax.kernels import placement
from llm_jax.kernels.grouped_matmul import blocks as blocks_lib
from llm_jax.kernels.grouped_matmul import groups
from llm_jax.kernels.grouped_matmul import pallas
from llm_jax.kernels.grouped_matmul import ragged
from llm_jax.kernels.grouped_matmul import reference
from llm_jax.kernels.grouped_matmul import tiled

_LOG = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "reference", "tiled", "ragged_dot", "pallas")

_DTYPES = ("bfloat16", "float32")


class Local(Protocol):
    """An implementation. Hashable."""

    def product(
        self, x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, is_transposed: bool
    ) -> jax.Array:
        """Returns each row times its group's matrix, or times its transpose, [R, F] or [R, D]."""
        ...

    def weight_gradient(self, x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """Returns the sum over a group's rows of outer products, [E, D, F], in their dtype."""
        ...


def grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    sizes_E: jax.Array,
    *,
    implementation: str = "auto",
    blocks: blocks_lib.Blocks | None = None,
) -> jax.Array:
    """Multiplies rows, sorted by group, by their group's matrix.

    Group e has the next `sizes_E[e]` rows. Rows after the last group give 0 and have no gradient,
    whatever they hold; the matrix of a group without rows has a gradient of 0. Products are of the
    arrays' dtype, sums are float32. Differentiable in `x_RD` and `w_EDF`. All is local: inside of
    `jax.shard_map` the arrays are a device's own.

    `reference` computes every row with every matrix, `tiled` loops over tiles of rows, `ragged_dot`
    is XLA's, `pallas` are kernels for the TPUs of the mesh that is set, interpreted on a CPU. `auto`
    takes `tiled` on a CPU, `pallas` on a TPU that it has sizes for, and `ragged_dot` elsewhere. The log
    says what it took.

    Args:
      x_RD: bfloat16 or float32.
      w_EDF: in the same dtype.
      sizes_E: int32, not negative; their sum is R at the most.
      blocks: overrides the sizes of all kernels of `pallas`.

    Returns:
      [R, F] in the dtype of `x_RD`.

    Raises:
      TypeError: dtypes that it does not take.
      ValueError: shapes that do not fit each other, or an unknown implementation.
    """
    _check(x_RD, w_EDF, sizes_E)
    device_kind = placement.device_kind()
    if implementation == "auto":
        implementation = _choose(device_kind)
        _say(implementation, x_RD.shape, w_EDF.shape)
    if implementation == "reference":
        return reference.grouped_matmul(x_RD, w_EDF, sizes_E)
    local = _make(implementation, device_kind, blocks)
    # Outside of what has a gradient of its own: that of what was made to vary is then summed by JAX.
    return _grouped_matmul(local, *groups.varying(x_RD, w_EDF, sizes_E))


def _choose(device_kind: str) -> str:
    if device_kind == "cpu":
        return "tiled"
    return "pallas" if blocks_lib.is_known(device_kind) else "ragged_dot"


def _make(implementation: str, device_kind: str, blocks: blocks_lib.Blocks | None) -> Local:
    if implementation == "tiled":
        return tiled.Tiled()
    if implementation == "ragged_dot":
        return ragged.Ragged()
    if implementation == "pallas":
        blocks_lib.device(device_kind)
        return pallas.Pallas(device_kind, blocks)
    raise ValueError(
        f"grouped matmul implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(local: Local, x_RD, w_EDF, sizes_E):
    return local.product(x_RD, w_EDF, sizes_E, is_transposed=False)


def _forward(local, x_RD, w_EDF, sizes_E):
    return _grouped_matmul(local, x_RD, w_EDF, sizes_E), (x_RD, w_EDF, sizes_E)


def _backward(local, residuals, dy_RF):
    x_RD, w_EDF, sizes_E = residuals
    dx_RD = local.product(dy_RF, w_EDF, sizes_E, is_transposed=True)
    return dx_RD, local.weight_gradient(x_RD, dy_RF, sizes_E), None


_grouped_matmul.defvjp(_forward, _backward)


@functools.cache
def _say(implementation: str, x_shape: tuple[int, ...], w_shape: tuple[int, ...]) -> None:
    """Logs a choice once."""
    _LOG.info("grouped matmul of %s by %s: %s", list(x_shape), list(w_shape), implementation)


def _check(x_RD, w_EDF, sizes_E) -> None:
    if x_RD.dtype not in map(jnp.dtype, _DTYPES) or w_EDF.dtype != x_RD.dtype:
        raise TypeError(
            f"grouped matmul of x {x_RD.dtype}{list(x_RD.shape)} by w"
            f" {w_EDF.dtype}{list(w_EDF.shape)}: use {' or '.join(_DTYPES)} for both"
        )
    if sizes_E.dtype != jnp.int32:
        raise TypeError(f"grouped matmul by sizes of {sizes_E.dtype}: use int32")
    is_fit = x_RD.ndim == 2 and w_EDF.ndim == 3 and sizes_E.ndim == 1
    if not is_fit or x_RD.shape[1] != w_EDF.shape[1] or sizes_E.shape[0] != w_EDF.shape[0]:
        raise ValueError(
            f"x [R,D] = {x_RD.shape}, w [E,D,F] = {w_EDF.shape} and sizes [E] = {sizes_E.shape} do"
            " not fit each other"
        )
    if 0 in (*x_RD.shape, *w_EDF.shape):
        raise ValueError(
            f"x [R,D] = {x_RD.shape} by w [E,D,F] = {w_EDF.shape}: use 1 or more of each dimension"
        )
