"""On which devices queries and keys lie, and where a device's part of them begins."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from llm_jax.kernels import placement
from llm_jax.kernels.flash_attention import scores as scores_lib


class Axes(NamedTuple):
    """Axes of the mesh that the dimensions of the queries are cut over."""

    row: placement.Axes
    length: placement.Axes
    k: placement.Axes
    g: placement.Axes


def axes_of(q_BTKGC: jax.Array) -> Axes:
    """Returns where queries lie."""
    return Axes(*(*jax.typeof(q_BTKGC).sharding.spec, *(None,) * 4)[:4])


def on_each(
    local: Callable[..., Any],
    outs: Sequence[str],
    arrays: Sequence[Any],
    more: Sequence[tuple[str, jax.Array]] = (),
    is_ring: bool = False,
) -> Any:
    """Runs `local` where the arrays lie: a kernel cannot be cut up from outside.

    Keys and values, and what belongs to rows and heads, lie as the queries do; of a sequence that is cut
    each device has some of the queries and all keys, or in a ring some of both.

    Args:
      local: called with `Axes` and this device's pieces.
      outs: letters of the results.
      arrays: of the attention, queries first.
      more: pairs of letters and array, which follow them.
    """
    axes = axes_of(arrays[0])
    local = functools.partial(local, axes)
    if not any(axes):
        return local(*arrays, *(array for _, array in more))
    cut = dict(zip("BTKG", axes)) | ({"S": axes.length} if is_ring else {})

    def spec(letters: str) -> PartitionSpec:
        return PartitionSpec(*(cut.get(letter) for letter in letters))

    extra = (jax.sharding.reshard(array, spec(letters)) for letters, array in more)
    out_specs = tuple(spec(letters) for letters in outs)
    run = jax.shard_map(local, out_specs=out_specs, check_vma=False)
    return run(*arrays, *extra)


def offset(axes: placement.Axes, size: int) -> jax.Array:
    """Returns where this device's part begins of a dimension cut over mesh axes."""
    if axes is None:
        return jnp.zeros((), jnp.int32)
    return jax.lax.axis_index(axes) * size


def origin(
    axes: Axes, q_BTKGC: jax.Array, query: jax.Array, key: jax.Array | None = None
) -> scores_lib.Origin:
    """Returns where this device's rows and heads begin, and the given query and key."""
    B, _, K, G, _ = q_BTKGC.shape
    groups = placement.num_parts(axes.g) * G
    head = offset(axes.k, K * groups) + offset(axes.g, G)
    return scores_lib.Origin(offset(axes.row, B), head, query, key, G, groups)


def heads_first(x: jax.Array) -> jax.Array:
    """[B, T, ..., C] as [B, H, T, C], all heads in one dimension."""
    x = x.reshape(*x.shape[:2], -1, x.shape[-1])
    return jnp.swapaxes(x, 1, 2)


def no_gradient(tree: Any) -> Any:
    """Returns the cotangents of integers."""
    return jax.tree.map(lambda x: np.zeros(jnp.shape(x), jax.dtypes.float0), tree)
