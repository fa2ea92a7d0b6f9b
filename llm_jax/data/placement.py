"""From a host's rows to global arrays on the mesh."""

from collections.abc import Iterator

import jax
import numpy as np

from llm_jax.data import batch as batch_lib

_LABELS = ("targets", "weights")  # which are of whole rows in some objectives


def host_rows(sharding: jax.sharding.NamedSharding, shape: tuple[int, int]) -> np.ndarray:
    """Returns the rows of a global [B, T] batch that this process's devices hold, ascending."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    rows = np.arange(shape[0])
    return np.unique(np.concatenate([rows[index[0]] for index in indices]))


def to_mesh(
    host_batch: batch_lib.Batch,
    sharding: jax.sharding.NamedSharding,
    batch_size: int,
    rows: np.ndarray,
) -> batch_lib.Batch:
    """Returns the global batch, of which this process provides `rows`.

    Args:
      host_batch: numpy arrays of its rows; fields that are None stay so.
      sharding: of a [B, T] field. Labels, [B] or [B, 2], lie as the rows do.
      batch_size: B.
      rows: which rows of the global batch these are, ascending.

    Copies to the devices are started, not waited for.
    """
    row_axes = sharding.spec[0] if len(sharding.spec) else None
    of_rows = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(row_axes))

    def place(name: str, local: np.ndarray | None) -> jax.Array | None:
        if local is None:
            return None

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            wanted = np.arange(batch_size)[index[0]]
            first = np.searchsorted(rows, wanted[0])
            return local[(slice(first, first + len(wanted)), *index[1:])]

        is_label = name in _LABELS and local.shape != host_batch.tokens.shape
        shape = (batch_size, *local.shape[1:])
        return jax.make_array_from_callback(shape, of_rows if is_label else sharding, piece)

    return batch_lib.Batch(*map(place, batch_lib.Batch._fields, host_batch))


def on_mesh(
    host_batches: Iterator[batch_lib.Batch],
    sharding: jax.sharding.NamedSharding,
    batch_size: int,
    rows: np.ndarray,
) -> Iterator[batch_lib.Batch]:
    """Yields each host batch as a global one."""
    for host_batch in host_batches:
        yield to_mesh(host_batch, sharding, batch_size, rows)
