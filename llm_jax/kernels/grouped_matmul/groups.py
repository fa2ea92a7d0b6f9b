"""Where groups of rows begin and end, and what the implementations make of that."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tiles(NamedTuple):
    """Rows in tiles, each of one group.

    Attributes:
      starts_E, ends_E: a group's first row, and the one after its last.
      last_E: how many tiles there are up to the end of a group.
      size: rows of a tile; the last one of a group reaches past it.
    """

    starts_E: jax.Array
    ends_E: jax.Array
    last_E: jax.Array
    size: int

    def place(self, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the group and the first row of a tile."""
        group = jnp.sum(self.last_E <= tile)
        first = jnp.where(group == 0, 0, self.last_E[group - 1])
        return group, self.starts_E[group] + (tile - first) * self.size


def tiles(sizes_E: jax.Array, size: int) -> Tiles:
    """Cuts every group into tiles of `size` rows."""
    ends_E = jnp.cumsum(sizes_E)
    return Tiles(ends_E - sizes_E, ends_E, jnp.cumsum(-(-sizes_E // size)), size)


def without_rest(x_RD: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns the rows with those of no group, after the last one, set to 0."""
    is_in_R1 = (jnp.arange(x_RD.shape[0]) < jnp.sum(sizes_E))[:, None]
    return jnp.where(is_in_R1, x_RD, jnp.zeros((), x_RD.dtype))


def varying(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the arrays with all of them varying over the mesh axes that any of them varies over.

    For `jax.shard_map` with `check_vma`; elsewhere they are returned as they are.
    """
    varied = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    missing = [frozenset().union(*varied) - axes for axes in varied]
    return tuple(
        jax.lax.pcast(array, tuple(axes), to="varying") if axes else array
        for array, axes in zip(arrays, missing)
    )
