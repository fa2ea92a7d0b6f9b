"""Which blocks of keys each block of queries visits in the forward kernel, as tables of integers.

A visit's unit is a tile of queries by a chunk of keys, 256 by 256: the finest at which a mask is looked
at, so what a mask costs is held against the units with an open pair, of its own and of the causal mask.
"""

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
      span: keys that VMEM holds at once; None for all of them.
      own: chunks that a tile sees in a visit where each has its own.
    """

    q: int = 2048
    kv: int = 1024
    tile: int = 256
    chunk: int = 256
    lead: int = 6
    lag: int = 2
    slots: int = 2
    span: int | None = None
    own: int = 2

    def __post_init__(self):
        if self.q % (self.tile * self.slots) or self.kv % self.chunk:
            raise ValueError(f"{self}: q must divide by tile * slots, and kv by chunk")
        if (self.kv // self.chunk) % self.own:
            raise ValueError(f"{self}: kv must divide by chunk * own")
        if self.span is not None and (self.span % self.chunk or self.span < self.kv):
            raise ValueError(f"{self}: span must divide by chunk and hold kv")

    def fit(self, num_queries: int) -> "Blocks":
        """Shrinks the block of queries to short sequences."""
        step = self.tile * self.slots
        return dataclasses.replace(self, q=min(self.q, -(-num_queries // step) * step))


class Kind(NamedTuple):
    """What is known of a visit when the kernel is compiled: a body of its own.

    Attributes:
      pattern: SKIP, OPEN (no mask arithmetic) or PART + n, where mask n decides, for each
        [tile][chunk].
      is_first, is_last: whether the visit begins and ends a block of queries.
      is_own: whether each tile sees chunks of its own, from a list, all of them masked.
    """

    pattern: tuple[tuple[int, ...], ...]
    is_first: bool
    is_last: bool
    is_own: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """The visits of all blocks of queries, step by step and kind by kind.

    A step is a block of queries with one span of keys; the steps of a block follow each other.

    Attributes:
      start, stop: int32 [rows * kinds]; kind n of row r visits `kv[start[r * kinds + n] : stop[...]]`.
        A row is a step of one batch row, or of all (`is_per_row`).
      kv: int32, first keys of the visits in chunks; one more than are visited, so that there is always
        a next one.
      units: int32, for visits in which tiles have chunks of their own: `start` and `stop` count them
        from 0, and here, tile by tile, are the chunks, counted in the span, `per_word` in a number.
      q_block: int32 [steps].
      first: int32 [steps], the span's first key in chunks.
      flags: int32 [steps], of `NEW_SPAN`, `NEW_HEAD` and `CONTINUES`.
      kinds: in the order in which a step goes through them.
      span: keys that VMEM holds at once, those past the end included.
      num_past: by how many keys a span may reach past the end; None for one span of all keys.
      is_per_row: whether each row of the batch has its own `start`, `stop` and `kv`.
      part_masks: of the patterns; where there are none PART is the mask of the attention.
    """

    start: Any
    stop: Any
    kv: Any
    units: Any
    q_block: Any
    first: Any
    flags: Any
    kinds: tuple[Kind, ...] = dataclasses.field(metadata={"static": True})
    span: int = dataclasses.field(metadata={"static": True})
    num_past: int | None = dataclasses.field(metadata={"static": True})
    is_per_row: bool = dataclasses.field(metadata={"static": True})
    part_masks: tuple[masks.Mask, ...] = dataclasses.field(default=(), metadata={"static": True})


def per_word(num_chunks: int) -> int:
    """Returns how many numbers of chunks of a span an integer of `Visits.units` holds."""
    return 4 if num_chunks <= 256 else 2


# What a step is: its span differs from that of the step before, or only its head does; it goes on with
# the queries of the step before.
NEW_SPAN, NEW_HEAD, CONTINUES = 1, 2, 4


def fitted(
    blocks: Blocks, mask: masks.Mask, num_queries: int, num_keys: int, q_offset: Any = 0
) -> Blocks:
    """Returns the sizes for a mask and lengths: what a block of queries may see decides.

    Where that is a narrow band, keys in VMEM go along with the queries instead of lying there all the
    time; where it is known beforehand and narrow enough, one visit takes all of it.
    """
    blocks, q_offset = blocks.fit(num_queries), _known(mask, q_offset)
    if blocks.span is not None:
        return blocks
    if masks.is_static(mask) and isinstance(q_offset, int):
        for q in (2 * blocks.q, blocks.q) if 2 * blocks.q <= num_queries else (blocks.q,):
            band = dataclasses.replace(blocks, q=q)
            width, units = _band(mask, num_queries, num_keys, band, q_offset)
            if width <= num_keys // 2 and units <= _MAX_UNITS:
                return dataclasses.replace(band, kv=width, span=width, own=1)
    lo, hi = _hulls(mask, num_queries, num_keys, blocks, q_offset)
    width = int((hi - lo).max()) * blocks.chunk
    if width > num_keys // 2:
        return blocks
    return dataclasses.replace(blocks, span=-(-width // blocks.kv) * blocks.kv)


def _known(mask: masks.Mask, q_offset: Any) -> Any:
    """Returns an offset to make tables by: any will do for a mask to which it is all the same."""
    return q_offset if masks.depends_on_query_slots(mask) else 0


# More of them in a body take longer to compile than they save.
_MAX_UNITS = 96


def _band(
    mask: masks.Mask, num_queries: int, num_keys: int, blocks: Blocks, q_offset: Any
) -> tuple[int, int]:
    """Returns how many keys a block of queries may see, from the first to the last, and the units."""
    lo, hi = _hulls(mask, num_queries, num_keys, blocks, q_offset)
    some = masks.seen_blocks(mask, num_queries, num_keys, blocks.tile, blocks.chunk, q_offset)
    per_q = blocks.q // blocks.tile
    units = np.add.reduceat(some.sum(1), np.arange(0, len(some), per_q))
    return int((hi - lo).max()) * blocks.chunk, int(units.max())


def _hulls(
    mask: masks.Mask, num_queries: int, num_keys: int, blocks: Blocks, q_offset: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Returns first and last (excluded) chunk that a block of queries may see before data is known."""
    if isinstance(q_offset, int):
        some = masks.seen_blocks(mask, num_queries, num_keys, blocks.q, blocks.chunk, q_offset)
    else:
        some = np.ones((-(-num_queries // blocks.q), -(-num_keys // blocks.chunk)), bool)
    lo = np.where(some.any(1), some.argmax(1), 0)
    hi = np.where(some.any(1), some.shape[1] - some[:, ::-1].argmax(1), 1)
    return lo, hi


def make_visits(
    mask: masks.Mask, num_queries: int, num_keys: int, blocks: Blocks, q_offset: Any = 0
) -> Visits:
    """Returns the tables of a mask: numpy constants if it is static, else arrays of this program.

    Tables of arrays are the same for all layers; make them once, outside the scan over layers.
    """
    q_offset = _known(mask, q_offset)
    classes = _classes(mask, num_queries, num_keys, blocks, q_offset)
    if isinstance(classes, np.ndarray) and classes.shape[0] == 1:
        classes, found = classes[0], ()
        if masks.is_static(mask):
            classes, found = _simplified(mask, classes, num_keys, blocks, q_offset)
        return dataclasses.replace(_static_visits(classes, num_keys, blocks), part_masks=found)
    hulls = _hulls(mask, num_queries, num_keys, blocks, q_offset)
    return _dynamic_visits(jnp.asarray(classes), num_keys, hulls, blocks)


def _classes(
    mask: masks.Mask, num_queries: int, num_keys: int, blocks: Blocks, q_offset: Any
) -> Any:
    """Returns SKIP, OPEN or PART, [1 or B, q blocks, tiles, chunks] of whole blocks."""
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
    return classes.reshape(rows, -1, per_q, classes.shape[2])


def _simplified(
    mask: masks.Mask, classes: np.ndarray, num_keys: int, blocks: Blocks, q_offset: int
) -> tuple[np.ndarray, tuple[masks.Mask, ...]]:
    """Returns a static mask's classes and masks: each part has one with what matters there alone."""
    classes, found = classes.copy(), {mask: 0}
    for i, r, c in np.argwhere(classes == PART).tolist():
        q_start, k_start = q_offset + i * blocks.q + r * blocks.tile, c * blocks.chunk
        part = mask.within(
            masks.Interval(q_start, q_start + blocks.tile - 1),
            masks.Interval(k_start, min(k_start + blocks.chunk, num_keys) - 1),
        )
        classes[i, r, c] = PART + found.setdefault(part, len(found))
    return classes, tuple(found)


# More bodies than this take longer to compile than they save.
_MAX_KINDS = 8


def _as_pattern(array: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, array.tolist()))


def _walk(classes: np.ndarray, width: int) -> list[tuple[int, Kind]]:
    """Returns the visits of a block of queries [tiles, chunks]: first chunk and kind."""
    chunks, begins = np.flatnonzero(classes.any(0)), []
    while len(chunks):
        begins.append(int(chunks[0]))
        chunks = chunks[chunks >= begins[-1] + width]
    begins = begins or [0]  # a block of queries that sees no key still writes zeros
    padded = np.pad(classes, ((0, 0), (0, width)), constant_values=SKIP)
    return [
        (j, Kind(_as_pattern(padded[:, j : j + width]), j == begins[0], j == begins[-1]))
        for j in begins
    ]


def _static_visits(classes: np.ndarray, num_keys: int, blocks: Blocks) -> Visits:
    """Tables of a mask known beforehand: a body for each pattern that occurs."""
    width = blocks.kv // blocks.chunk
    walks = [_walk(of_block, width) for of_block in classes]
    span = (blocks.span or _MAX_KEYS) // blocks.chunk
    steps = []  # block of queries, first chunk, visits
    for i, walk in enumerate(walks):
        end = 0
        for j, kind in walk:
            if j + width > end:
                first = 0 if blocks.span is None else j
                end = first + span
                steps.append((i, first, []))
            steps[-1][2].append((j, kind))
    rename = _limited({kind for walk in walks for _, kind in walk})
    kinds = sorted(
        set(rename.values()), key=lambda kind: (kind.is_last, not kind.is_first, kind.pattern)
    )
    start, stop, kv = [], [], []
    for *_, row in steps:  # in the order of execution: the kernel looks up the visit after this one
        for kind in kinds:
            start.append(len(kv))
            kv += [j for j, other in row if rename[other] == kind]
            stop.append(len(kv))
    tables = [np.asarray(x, np.int32) for x in (start, stop, [*kv, 0], [0])]
    tables += _step_tables([step[:2] for step in steps])
    if blocks.span is None:
        return Visits(*tables, tuple(kinds), (max(kv) + width) * blocks.chunk, None, False)
    return Visits(*tables, tuple(kinds), blocks.span, _num_past(steps, num_keys, blocks), False)


# As good as infinitely many.
_MAX_KEYS = 2**30


def _num_past(steps: list[tuple], num_keys: int, blocks: Blocks) -> int:
    end = max(step[1] for step in steps) * blocks.chunk + blocks.span
    return max(0, end - num_keys)


def _limited(kinds: set[Kind]) -> dict[Kind, Kind]:
    """Returns the kinds to take instead: all that are not open masked throughout, if there are many."""
    if len(kinds) <= _MAX_KINDS:
        return {kind: kind for kind in kinds}
    shape = np.shape(next(iter(kinds)).pattern)
    is_open, coarse = (_as_pattern(np.full(shape, state)) for state in (OPEN, PART))
    return {
        kind: kind if kind.pattern == is_open else kind._replace(pattern=coarse) for kind in kinds
    }


def _step_tables(steps: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns `q_block`, `first` and `flags` of the steps."""
    q_block, first = (np.asarray(x, np.int32) for x in zip(*steps))
    flags = np.where(first != np.roll(first, 1), NEW_SPAN, 0)
    # The last step of the head before, which may have had the same keys.
    flags[0] = NEW_HEAD if flags[0] == 0 else NEW_SPAN
    flags[1:] |= np.where(q_block[1:] == q_block[:-1], CONTINUES, 0)
    return q_block, first, flags.astype(np.int32)


def _dynamic_visits(
    classes: jax.Array, num_keys: int, hulls: tuple[np.ndarray, np.ndarray], blocks: Blocks
) -> Visits:
    """Tables of a mask that is data.

    Blocks that are open to all queries are visited by all. Of what is left, partly open, each tile has
    a list, so that it sees its own chunks alone.
    """
    rows, num_q, num_tiles, num_chunks = classes.shape
    width = blocks.kv // blocks.chunk
    if blocks.span is None:
        steps, span = [(i, 0) for i in range(num_q)], num_chunks
    else:
        span = blocks.span // blocks.chunk // width * width
        steps = [(i, x) for i, (lo, hi) in enumerate(zip(*hulls)) for x in range(lo, hi, span)]
    step_tables = q_block, first, _ = _step_tables(steps)
    at = np.minimum(first[:, None] + np.arange(span), num_chunks)
    classes = jnp.pad(classes, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=SKIP)
    classes = jnp.moveaxis(classes, 3, 2)[:, q_block[:, None], at]  # rows, steps, chunks, tiles
    classes = classes.reshape(rows * len(steps), -1, width, num_tiles)
    is_first, is_last = (np.tile(x, rows) for x in _ends(q_block))
    is_open, is_needed = _shares(classes, is_last)

    rank = jnp.where(is_needed, 0, jnp.where(is_open[..., None, None], 2, 1))
    order = jnp.argsort(rank.reshape(len(is_open), span, num_tiles), axis=1, stable=True)
    longest = jnp.max(jnp.sum(is_needed, (1, 2)), 1)
    num_open, num_own = jnp.sum(is_open, 1), -(-longest // blocks.own)
    num_own = jnp.maximum(num_own, is_last | is_first & (num_open == 0))
    counts = _counts(num_open, num_own, is_first, is_last)
    row = np.arange(len(is_open))[:, None]
    stop = jnp.concatenate(
        [
            row * (span // width) + jnp.cumsum(counts[:, :2], 1),
            row * (span // blocks.own) + jnp.cumsum(counts[:, 2:], 1),
        ],
        1,
    )
    begins = np.tile(first, rows)[:, None] + np.arange(0, span, width)
    begins = jnp.take_along_axis(begins, jnp.argsort(~is_open, axis=1, stable=True), 1)
    kv = jnp.append(begins, 0)
    tables = (stop - counts, stop, kv, _packed(order, blocks.own))
    tables = [x.reshape(-1).astype(jnp.int32) for x in tables]
    kinds = tuple(
        Kind(((state,) * (blocks.own if is_own else width),) * num_tiles, *ends, is_own)
        for state, *ends, is_own in _DYNAMIC_KINDS
    )
    num_past = None if blocks.span is None else _num_past(steps, num_keys, blocks)
    held = blocks.span or span * blocks.chunk
    return Visits(*tables, *step_tables, kinds, held, num_past, rows > 1)


# By pattern, first, last, own; in the order of execution.
_DYNAMIC_KINDS = (
    (OPEN, True, False, False),
    (OPEN, False, False, False),
    (PART, True, False, True),
    (PART, False, False, True),
    (PART, False, True, True),
    (PART, True, True, True),
)


def _ends(q_block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether steps begin and end a block of queries."""
    return np.diff(q_block, prepend=-1) != 0, np.diff(q_block, append=-1) != 0


def _shares(classes: jax.Array, is_last: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns which blocks of keys all tiles visit, and what tiles visit on their own.

    Args:
      classes: [steps, visits, chunks, tiles].
      is_last: [steps]; such a step ends with chunks of tiles: with open ones if there are no others.
    """
    is_open = jnp.all(classes == OPEN, (2, 3))
    has_rest = jnp.any((classes != SKIP) & ~is_open[..., None, None], (1, 2, 3))
    number = np.arange(is_open.shape[1])
    final = jnp.max(jnp.where(is_open, number, -1), 1)
    is_open &= ~((is_last & ~has_rest)[:, None] & (number == final[:, None]))
    return is_open, (classes != SKIP) & ~is_open[..., None, None]


def _counts(num_open, num_own, is_first: np.ndarray, is_last: np.ndarray) -> jax.Array:
    """Returns the number of visits of each of `_DYNAMIC_KINDS`, [steps, kinds]."""
    opens = is_first & (num_open > 0)
    begins, ends = is_first & ~opens, is_last
    is_single = begins & ends & (num_own == 1)
    begins, ends = begins & ~is_single, ends & ~is_single
    between = num_own - begins - ends - is_single
    return jnp.stack([opens, num_open - opens, begins, between, ends, is_single], 1)


def _packed(order: jax.Array, own: int) -> jax.Array:
    """Returns `Visits.units` of the chunks of each step, [steps, chunks, tiles]."""
    steps, num_chunks, num_tiles = order.shape
    number = per_word(num_chunks)
    order = order.reshape(steps, -1, own, num_tiles).swapaxes(2, 3)
    order = jnp.pad(order, ((0, 0),) * 3 + ((0, -own % number),))
    order = order.reshape(*order.shape[:3], -1, number)
    return jnp.sum(order << (np.arange(number) * (32 // number)), -1)
