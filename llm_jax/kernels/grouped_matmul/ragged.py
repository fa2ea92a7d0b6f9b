"""The grouped matrix product by `jax.lax.ragged_dot`, XLA's own."""

import dataclasses

import jax

from llm_jax.kernels.grouped_matmul import groups

# Contracted dimensions, the dimension of the groups, and that of the groups' matrices.
_PRODUCT = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
_TRANSPOSED = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
_GRADIENT = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


@dataclasses.dataclass(frozen=True)
class Ragged:
    """An `op.Local`.

    What XLA compiles for a TPU leaves rows after the last group as it finds them in memory, so they
    are set to 0 here. Sums are float32, whatever the result is rounded to.
    """

    def product(self, x_RD, w_EDF, sizes_E, is_transposed):
        """As `op.Local`."""
        y_RF = jax.lax.ragged_dot_general(
            x_RD,
            w_EDF,
            sizes_E,
            _TRANSPOSED if is_transposed else _PRODUCT,
            preferred_element_type=x_RD.dtype,
        )
        return groups.without_rest(y_RF, sizes_E)

    def weight_gradient(self, x_RD, dy_RF, sizes_E):
        """As `op.Local`."""
        return jax.lax.ragged_dot_general(
            x_RD,
            dy_RF,
            sizes_E,
            _GRADIENT,
            preferred_element_type=x_RD.dtype,
        )
