"""Expert parallelism: rows to the devices that have their experts, and back, by all-to-all.

Each device holds E / n experts, and tokens of its own. How many rows go where is data: on TPUs
`jax.lax.ragged_all_to_all` moves just these; elsewhere XLA has no such operation, and blocks of the largest
size that there may be are moved instead, which gives the same.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.kernels import placement


class _Moves(NamedTuple):
    """Which rows go from which device to which: int32 [n, n], sources first, the same on all of them.

    Attributes:
      starts: where they begin on their source.
      counts: how many there are.
      ends: where they begin at their destination.
    """

    starts: jax.Array
    counts: jax.Array
    ends: jax.Array

    def back(self) -> "_Moves":
        return _Moves(self.ends.T, self.counts.T, self.starts.T)


def elsewhere(
    rows_RD: jax.Array,
    sizes_E: jax.Array,
    run: Callable[[jax.Array, jax.Array], jax.Array],
    axis: str,
    buffer_factor: float | None,
    axes: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """Returns what experts on all devices of a mesh axis make of a device's rows, and how many it dropped.

    Inside `jax.shard_map`.

    Args:
      rows_RD: sorted by expert; what is left after the last expert's is of none.
      sizes_E: int32, how many rows each expert has, of all E.
      run: given rows sorted by the experts of this device, and their sizes, their results.
      axis: of the mesh; its device i has the experts from i * E / n on.
      buffer_factor: as of `sort.sorted_by_expert`.
      axes: of the mesh, all those that arrays differ along.
    """
    n, room = jax.lax.axis_size(axis), rows_RD.shape[0]
    buffer = n * room if buffer_factor is None else min(math.ceil(room * buffer_factor), n * room)
    here = jax.lax.axis_index(axis)
    # [source, destination, expert of the destination]
    sizes = jax.lax.all_gather(sizes_E, axis).reshape(n, n, -1)
    wanted = jnp.sum(sizes, axis=2)
    ends = _before(wanted, axis=0)
    counts = jnp.clip(
        buffer - ends, 0, wanted
    )  # the last ones find no room, if there is too little
    moves = _Moves(_before(wanted, axis=1), counts, jnp.minimum(ends, buffer))
    received_RD = _moved(rows_RD, moves, axis, buffer, axes)

    of_source = jax.lax.dynamic_index_in_dim(sizes, here, 1, keepdims=False)
    taken = jax.lax.dynamic_index_in_dim(counts, here, 1, keepdims=True)
    kept = jnp.clip(taken - _before(of_source, axis=1), 0, of_source)
    num_local = kept.shape[1]
    total = jnp.sum(kept)
    ids = jnp.tile(jnp.arange(num_local), n)
    ids = jnp.repeat(ids, kept.reshape(-1), total_repeat_length=buffer)
    ids = jnp.where(jnp.arange(buffer) < total, ids, num_local)
    order = jnp.argsort(ids)
    y_RD = _permuted(received_RD, order, jnp.argsort(order))
    y_RD = run(y_RD, jnp.sum(kept, axis=0))
    y_RD = _permuted(y_RD, jnp.argsort(order), order)
    dropped = jnp.sum((wanted - counts)[here]).astype(jnp.float32)
    return _moved(y_RD, moves.back(), axis, room, axes), dropped


def _before(sizes: jax.Array, axis: int) -> jax.Array:
    """Returns the sum of all before each."""
    return jnp.cumsum(sizes, axis=axis) - sizes


@jax.custom_vjp
def _permuted(x_RD: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    return x_RD[order]


_permuted.defvjp(
    lambda x_RD, order, inverse: (x_RD[order], inverse),
    lambda inverse, d_RD: (d_RD[inverse], None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _moved(
    x_RD: jax.Array, moves: _Moves, axis: str, num_rows: int, axes: tuple[str, ...]
) -> jax.Array:
    """Returns the rows that come to this device, zeros where none do.

    Args:
      x_RD: its own.
      moves: which go where.
      axis: of the mesh.
      num_rows: of the result.
      axes: as of `elsewhere`.
    """
    here = jax.lax.axis_index(axis)
    starts, counts, ends = moves
    empty_RD = jnp.zeros((num_rows, x_RD.shape[1]), x_RD.dtype)
    empty_RD = jax.lax.pcast(empty_RD, axes, to="varying")
    if placement.device_kind().startswith("TPU"):
        return jax.lax.ragged_all_to_all(
            x_RD, empty_RD, starts[here], counts[here], ends[here], counts[:, here], axis_name=axis
        )
    size = min(x_RD.shape[0], num_rows)
    places = jnp.arange(size)
    is_sent = places < counts[here][:, None]
    sent = x_RD.at[jnp.where(is_sent, starts[here][:, None] + places, len(x_RD))].get(
        mode="fill", fill_value=0
    )
    received = jax.lax.all_to_all(sent, axis, split_axis=0, concat_axis=0)
    is_received = places < counts[:, here][:, None]
    places = jnp.where(is_received, ends[:, here][:, None] + places, num_rows)
    return empty_RD.at[places].set(received, mode="drop")


def _moved_forward(x_RD, moves, axis, num_rows, axes):
    return _moved(x_RD, moves, axis, num_rows, axes), (moves, len(x_RD))


def _moved_backward(axis, num_rows, axes, residuals, d_RD):
    moves, num_own = residuals
    return _moved(d_RD, moves.back(), axis, num_own, axes), None


_moved.defvjp(_moved_forward, _moved_backward)
