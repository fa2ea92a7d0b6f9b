"""From a host's rows to global arrays on the mesh."""

from collections.abc import Iterator

import jax
import numpy as np

from llm_jax.data import batch as batch_lib


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
    """Returns the global batch, [B, T] each, of which this process provides `rows`.

    Copies to the devices are started, not waited for.
    """

    def place(local: np.ndarray) -> jax.Array:
        def piece(index: tuple[slice, slice]) -> np.ndarray:
            wanted = np.arange(batch_size)[index[0]]
            first = np.searchsorted(rows, wanted[0])
            return local[first : first + len(wanted), index[1]]

        return jax.make_array_from_callback((batch_size, local.shape[1]), sharding, piece)

    return batch_lib.Batch(*(place(local) for local in host_batch))


def on_mesh(
    host_batches: Iterator[batch_lib.Batch],
    sharding: jax.sharding.NamedSharding,
    batch_size: int,
    rows: np.ndarray,
) -> Iterator[batch_lib.Batch]:
    """Yields each host batch as a global one."""
    for host_batch in host_batches:
        yield to_mesh(host_batch, sharding, batch_size, rows)
