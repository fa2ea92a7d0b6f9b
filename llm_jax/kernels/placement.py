"""Where the arrays of a kernel lie on the mesh that is set, and what that is made of."""

from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Axes = str | Sequence[str] | None  # of the mesh that is set, which a dimension is cut over


def device_kind() -> str:
    """Returns what the mesh that is set is made of, which need not be of this host."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def num_parts(axes: Axes) -> int:
    """Returns how many devices a dimension on these axes of the mesh that is set lies on."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def is_cut(axes: Axes) -> bool:
    """Returns whether a dimension on these axes of the mesh that is set lies on several devices."""
    return num_parts(axes) > 1


def like_queries(tree: dict[str, Any], q_BTKGC: jax.Array, key_axes: Axes = None) -> dict[str, Any]:
    """Returns what belongs to rows, queries or heads, wherever it lies, cut over devices as they are.

    What belongs to keys lies on `key_axes`; an array for pairs of queries and keys is cut as queries are.
    """
    axes = dict(zip("BTKG", (*jax.typeof(q_BTKGC).sharding.spec, *(None,) * 5)))
    of_keys = axes | {"S": key_axes}
    if not any(axes.values()):
        return tree

    def cut(path, array):
        letters = getattr(path[-1], "name", getattr(path[-1], "key", "")).rpartition("_")[2]
        of = axes if "T" in letters else of_keys
        spec = [of.get(letter) if size > 1 else None for letter, size in zip(letters, array.shape)]
        return jax.sharding.reshard(jnp.asarray(array), PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(cut, tree)
