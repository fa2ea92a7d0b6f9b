"""Which blocks of keys each block of queries visits in the forward kernel, as tables of integers."""

import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.flash_attention import masks

SKIP, OPEN, PART = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes in rows. A visit is `q` queries by `kv` keys; its unit is `tile` queries by `chunk` keys.

    Attributes:
      lead: units by which `q @ k` runs ahead of the softmax.
      lag: units by which `p @ v` runs behind the softmax.
      slots: buffers of scores, each [kv, tile] in float32.
    """

    q: int = 2048
    kv: int = 1024
    tile: int = 256
    chunk: int = 256
    lead: int = 6
    lag: int = 2
    slots: int = 2

    def __post_init__(self):
        if self.q % (self.tile * self.slots) or self.kv % self.chunk:
            raise ValueError(f"{self}: q must divide by tile * slots, and kv by chunk")

    def fit(self, num_queries: int) -> "Blocks":
        """Shrinks the block of queries to short sequences."""
        step = self.tile * self.slots
        return dataclasses.replace(self, q=min(self.q, -(-num_queries // step) * step))


class Kind(NamedTuple):
    """What is known of a visit when the kernel is compiled: a body of its own.

    Attributes:
      pattern: SKIP, OPEN (no mask arithmetic) or PART for each [tile][chunk].
      is_first, is_last: whether the visit begins and ends a block of queries.
    """

    pattern: tuple[tuple[int, ...], ...]
    is_first: bool
    is_last: bool


@dataclasses.dataclass(frozen=True)
class Visits:
    """The visits of all blocks of queries, kind by kind.

    Attributes:
      kinds: in the order in which a block of queries goes through them.
      start, stop: int32 [rows * kinds]; kind n of row r visits `kv[start[r * kinds + n] : stop[...]]`.
        A row is a block of queries of one batch row, or of all (`is_per_row`).
      kv: int32, blocks of keys; one more than are visited, so that there is always a next one.
      is_per_row: whether each row of the batch has its own tables.
    """

    kinds: tuple[Kind, ...]
    start: Any
    stop: Any
    kv: Any
    is_per_row: bool


def make_visits(
    mask: masks.Mask, num_queries: int, num_keys: int, blocks: Blocks, q_offset: Any = 0
) -> Visits:
    """Returns the tables of a mask: numpy constants if it is static, else arrays of this program.

    Tables of arrays are the same for all layers; make them once, outside the scan over layers.
    """
    classes = _classes(mask, num_queries, num_keys, blocks, q_offset)
    if isinstance(classes, np.ndarray) and classes.shape[0] == 1:
        return _static_visits(classes[0])
    return _dynamic_visits(jnp.asarray(classes))


def _classes(
    mask: masks.Mask, num_queries: int, num_keys: int, blocks: Blocks, q_offset: Any
) -> Any:
    """Returns SKIP, OPEN or PART, [1 or B, q blocks, kv blocks, tiles, chunks]."""
    some, every = masks.block_bounds(
        mask, num_queries, num_keys, blocks.tile, blocks.chunk, q_offset
    )
    xp = np if isinstance(some, np.ndarray) else jnp
    rows, num_tiles, num_chunks = some.shape
    # Past the end of the keys lies anything at all: a cut chunk is masked, whatever the mask.
    is_whole = (np.arange(num_chunks) + 1) * blocks.chunk <= num_keys
    classes = xp.where(some, xp.where(every & is_whole, OPEN, PART), SKIP)
    per_q, per_kv = blocks.q // blocks.tile, blocks.kv // blocks.chunk
    spare = ((0, 0), (0, -num_tiles % per_q), (0, -num_chunks % per_kv))
    classes = xp.pad(classes, spare, constant_values=SKIP)
    shape = (rows, classes.shape[1] // per_q, per_q, classes.shape[2] // per_kv, per_kv)
    return classes.reshape(shape).swapaxes(2, 3)


# More bodies than this take longer to compile than they save.
_MAX_KINDS = 8


def _static_visits(classes: np.ndarray) -> Visits:
    """Tables of a mask known beforehand: a body for each pattern that occurs."""

    def as_pattern(array):
        return tuple(map(tuple, array.tolist()))

    rows = []
    for of_block in classes:
        # A block of queries that sees no key still writes zeros.
        keys = [j for j in range(len(of_block)) if of_block[j].any()] or [0]
        last = len(keys) - 1
        rows.append(
            [(j, Kind(as_pattern(of_block[j]), n == 0, n == last)) for n, j in enumerate(keys)]
        )
    is_open = as_pattern(np.full(classes.shape[2:], OPEN))
    if len({kind for row in rows for _, kind in row}) > _MAX_KINDS:
        coarse = as_pattern(np.full(classes.shape[2:], PART))
        rows = [
            [
                (j, kind if kind.pattern == is_open else kind._replace(pattern=coarse))
                for j, kind in row
            ]
            for row in rows
        ]
    kinds = sorted(
        {kind for row in rows for _, kind in row},
        key=lambda kind: (kind.is_last, not kind.is_first, kind.pattern),
    )
    start, stop, kv = [], [], []
    for row in rows:  # in the order of execution: the kernel looks up the visit after this one
        for kind in kinds:
            start.append(len(kv))
            kv += [j for j, other in row if other == kind]
            stop.append(len(kv))
    tables = (np.asarray(x, np.int32) for x in (start, stop, [*kv, 0]))
    return Visits(tuple(kinds), *tables, is_per_row=False)


def _dynamic_visits(classes: jax.Array) -> Visits:
    """Tables of a mask that is data: five bodies, of blocks wholly open or masked throughout."""
    rows, num_q, num_kv, num_tiles, num_chunks = classes.shape
    classes = classes.reshape(rows * num_q, num_kv, -1)
    some, is_open = jnp.any(classes != SKIP, -1), jnp.all(classes == OPEN, -1)
    # A block of queries that sees no key visits block 0, all of it masked.
    some = some.at[:, 0].set(some[:, 0] | ~jnp.any(some, 1))
    block = jnp.arange(num_kv)
    first = jnp.argmax(some, 1)[:, None]
    last = (num_kv - 1 - jnp.argmax(some[:, ::-1], 1))[:, None]
    kind = jnp.where(is_open, 1, 2)
    kind = jnp.where(block == last, 3, kind)
    kind = jnp.where(block == first, jnp.where(first == last, 4, 0), kind)
    kind = jnp.where(some, kind, 5)
    kv = jnp.argsort(kind * num_kv + block, axis=1)
    count = jnp.sum(kind[:, :, None] == jnp.arange(5), 1)
    stop = jnp.cumsum(count, 1) + jnp.arange(rows * num_q)[:, None] * num_kv
    part, opened = (((x,) * num_chunks,) * num_tiles for x in (PART, OPEN))
    kinds = (
        Kind(part, True, False),
        Kind(opened, False, False),
        Kind(part, False, False),
        Kind(part, False, True),
        Kind(part, True, True),
    )
    start, stop, kv = (x.reshape(-1).astype(jnp.int32) for x in (stop - count, stop, kv))
    return Visits(kinds, start, stop, jnp.append(kv, 0), is_per_row=rows > 1)
