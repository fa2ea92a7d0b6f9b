"""The grouped matrix product as a loop over tiles of rows: what a CPU is fast at."""

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax.kernels.grouped_matmul import groups


@dataclasses.dataclass(frozen=True)
class Tiled:
    """An `op.Local`. Takes as many products as there are rows, rounded up to a tile for each group.

    Attributes:
      tile: rows of a product.
    """

    tile: int = 128

    def product(self, x_RD, w_EDF, sizes_E, is_transposed):
        """As `op.Local`."""
        (R, D), tiles = x_RD.shape, groups.tiles(sizes_E, self.tile)
        # The last tile of a group reaches into the next one's rows, which are written after it.
        x_RD = _padded(x_RD, self.tile)

        def body(index, y_RF):
            group, start = tiles.place(index)
            rows_RD = jax.lax.dynamic_slice(x_RD, (start, 0), (self.tile, D))
            w = jax.lax.dynamic_index_in_dim(w_EDF, group, keepdims=False)
            dims = (((1,), (1 if is_transposed else 0,)), ((), ()))
            part = jax.lax.dot_general(rows_RD, w, dims, preferred_element_type=jnp.float32)
            return jax.lax.dynamic_update_slice(y_RF, part.astype(x_RD.dtype), (start, 0))

        width = w_EDF.shape[1 if is_transposed else 2]
        y_RF = jnp.zeros((R + self.tile, width), x_RD.dtype)
        y_RF, _ = groups.varying(y_RF, x_RD)
        y_RF = jax.lax.fori_loop(0, tiles.last_E[-1], body, y_RF)
        return groups.without_rest(y_RF[:R], sizes_E)

    def weight_gradient(self, x_RD, dy_RF, sizes_E):
        """As `op.Local`."""
        E, D, F = sizes_E.shape[0], x_RD.shape[1], dy_RF.shape[1]
        tiles, dtype = groups.tiles(sizes_E, self.tile), x_RD.dtype
        x_RD, dy_RF = _padded(x_RD, self.tile), _padded(dy_RF, self.tile)

        def body(index, dw_EDF):
            group, start = tiles.place(index)
            is_in_R1 = (start + jnp.arange(self.tile) < tiles.ends_E[group])[:, None]

            def own(array, width):
                rows = jax.lax.dynamic_slice(array, (start, 0), (self.tile, width))
                return jnp.where(is_in_R1, rows, jnp.zeros((), dtype))

            part_DF = jax.lax.dot_general(
                own(x_RD, D), own(dy_RF, F), (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            before_DF = jax.lax.dynamic_index_in_dim(dw_EDF, group, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(dw_EDF, before_DF + part_DF, group, 0)

        dw_EDF, _ = groups.varying(jnp.zeros((E, D, F), jnp.float32), x_RD)
        return jax.lax.fori_loop(0, tiles.last_E[-1], body, dw_EDF).astype(dtype)


def _padded(x_RD: jax.Array, num_rows: int) -> jax.Array:
    return jnp.pad(x_RD, ((0, num_rows), (0, 0)))
