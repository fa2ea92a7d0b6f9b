"""Which tiles the backward kernel visits, as tables of integers.

The grid walks macro blocks; inside one, loops walk lists of tiles. Open tiles, without mask
arithmetic, are large and come several at a time; what is left over joins the masked tiles, small ones,
which is correct (a mask is never wrong) and only slower.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.flash_attention import masks

# What a macro visit is to its blocks of keys and queries, as bits.
FIRST_K, LAST_K, FIRST_Q, LAST_Q, ALL_Q_DONE = 1, 2, 4, 8, 16


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes in rows: open tiles are whole masked tiles, macro blocks are whole open tiles.

    Attributes:
      open_unroll, masked_unroll: tiles that one turn of a loop takes, so that the end of one overlaps
        with the beginning of the next.
      vmem_bytes: what the kernel may ask for.
    """

    macro_q: int = 8192
    macro_k: int = 8192
    open_q: int = 512
    open_k: int = 512
    masked_q: int = 256
    masked_k: int = 512
    open_unroll: int = 4
    masked_unroll: int = 4
    vmem_bytes: int = 100 * 2**20

    def __post_init__(self):
        for axis in "qk":
            macro, large, small = (
                getattr(self, f"{size}_{axis}") for size in ("macro", "open", "masked")
            )
            if macro % large or large % small:
                raise ValueError(f"{self}: macro_{axis}, open_{axis}, masked_{axis} do not divide")

    def fit(self, num_queries: int, num_keys: int) -> "Blocks":
        """Shrinks the blocks to what the lengths need."""

        def sizes(length: int, macro: int, large: int, small: int) -> tuple[int, int, int]:
            small = min(small, 128 * -(-length // 128))
            large = small * max(1, min(large, length) // small)
            return large * min(max(1, macro // large), -(-length // large)), large, small

        q = sizes(num_queries, self.macro_q, self.open_q, self.masked_q)
        k = sizes(num_keys, self.macro_k, self.open_k, self.masked_k)
        names = ("macro", "open", "masked")
        changed = {f"{name}_q": size for name, size in zip(names, q)}
        changed |= {f"{name}_k": size for name, size in zip(names, k)}
        return dataclasses.replace(self, **changed)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """Tables [rows * num_visits] of the macro visits, and the lists of tiles that they point into.

    Attributes:
      columns: int32, by name. `q_block` and `k_block` of the visit, `flags`, and `dq_block`, which is
        completed next; `open_start` and `open_turns` in `tiles`; and for each n of `part_masks`
        `masked_start_n`, `masked_turns_n` and `masked_rest_n`.
      tiles: int32, `i | j << 16` in units of their own size, within the macro block.
      num_visits: of each row of the tables.
      is_per_row: whether each row of the batch has its own.
      part_masks: that of each list of masked tiles; None for the mask of the attention.
    """

    columns: dict[str, Any]
    tiles: Any
    num_visits: int = dataclasses.field(metadata={"static": True})
    is_per_row: bool = dataclasses.field(metadata={"static": True})
    part_masks: tuple[masks.Mask | None, ...] = dataclasses.field(metadata={"static": True})


def make_visits(
    mask: masks.Mask,
    num_queries: int,
    num_keys: int,
    blocks: Blocks,
    q_offset: Any = 0,
    is_q_outer: bool = False,
    flat_from: tuple[int, int] | None = None,
    is_everywhere: bool = False,
) -> Visits:
    """Returns the tables of a mask: numpy constants if it is static, else arrays of this program.

    Args:
      flat_from: distances, back and ahead of the query; open tiles lie whole beyond one of them. None
        for no bias, or one that makes no difference between tiles.
      is_everywhere: visit every macro block, as all of a full array's gradient must be written.
    """
    if flat_from is None and not masks.depends_on_query_slots(mask):
        q_offset = 0  # any will do
    some, is_open = _tiles_by_macro(mask, num_queries, num_keys, blocks, q_offset, flat_from)
    xp = np if isinstance(some, np.ndarray) else jnp
    num_rows, num_i, num_j = some.shape[:3]
    # What is visited must be known now; arrays of the program may visit anything.
    is_known = xp is np and not is_everywhere
    is_used = some.any((0, -2, -1)) if is_known else np.ones((num_i, num_j), bool)
    order = _order(is_used, is_q_outer)
    at_i, at_j = (np.asarray(x) for x in zip(*order))
    which, part_masks = _part_masks(mask, some, is_open, num_keys, blocks, q_offset)
    some, is_open, which = (x[:, at_i, at_j] for x in (some, is_open, which))

    lists, kept = _lists(xp, some, is_open, which, len(part_masks), blocks)
    counts = [xp.sum(is_in, -1) for is_in, _ in lists]
    tiles = xp.concatenate([_compacted(xp, *each) for each in lists], -1)
    starts = _starts(lists, num_rows)
    if xp is np:  # known lists follow each other without gaps
        is_in = np.concatenate([np.sort(~is_in, -1) for is_in, _ in lists], -1)
        tiles, before = tiles[~is_in], np.cumsum(~is_in.reshape(-1)) - ~is_in.reshape(-1)
        starts = [before[start] for start in starts]
    columns = _static_columns(order)
    columns |= {"open_start": starts[0], "open_turns": kept // blocks.open_unroll}
    for n in range(len(part_masks)):
        columns[f"masked_start_{n}"] = starts[n + 1]
        columns[f"masked_turns_{n}"] = counts[n + 1] // blocks.masked_unroll
        columns[f"masked_rest_{n}"] = counts[n + 1] % blocks.masked_unroll

    def flat(table):
        return xp.broadcast_to(table, (num_rows, len(order))).reshape(-1).astype(np.int32)

    return Visits(
        {name: flat(table) for name, table in columns.items()},
        tiles.reshape(-1).astype(np.int32) if tiles.size else np.zeros(1, np.int32),
        len(order),
        num_rows > 1,
        part_masks,
    )


def _lists(
    xp: Any, some: Any, is_open: Any, which: Any, num_masks: int, blocks: Blocks
) -> tuple[list[tuple[Any, int]], Any]:
    """Returns for the open tiles and each mask which are listed, with how many i there are; open ones.

    Open tiles come in whole turns; the others are left to the masked lists, tile by small tile.
    """
    count = xp.sum(is_open, (-2, -1))
    kept = count - count % blocks.open_unroll
    rank = xp.cumsum(_listed(is_open), -1)
    listed = _listed(is_open) & (rank <= kept[..., None])
    taken = xp.swapaxes(listed.reshape(*is_open.shape[:2], *is_open.shape[:1:-1]), -1, -2)
    ratio = blocks.open_q // blocks.masked_q, blocks.open_k // blocks.masked_k
    taken = xp.repeat(xp.repeat(taken, ratio[0], -2), ratio[1], -1)
    lists = [(listed, is_open.shape[-2])]
    lists += [(_listed(some & ~taken & (which == n)), some.shape[-2]) for n in range(num_masks)]
    return lists, kept


def _starts(lists: list[tuple[Any, int]], num_rows: int) -> list[np.ndarray]:
    """Returns where the list of each visit begins, [rows, visits], if all have their whole length."""
    lengths = [is_in.shape[-1] for is_in, _ in lists]
    visits = np.arange(num_rows * lists[0][0].shape[1]).reshape(num_rows, -1) * sum(lengths)
    return [visits + sum(lengths[:n]) for n in range(len(lists))]


# A list for each costs bodies.
_MAX_MASKS = 3


def _part_masks(
    mask: masks.Mask, some: Any, is_open: Any, num_keys: int, blocks: Blocks, q_offset: Any
) -> tuple[Any, tuple[masks.Mask | None, ...]]:
    """Returns the list of each tile, in the shape of `some`, and the masks of the lists.

    A static mask's tile has a mask with what matters there alone.
    """
    which = np.zeros(some.shape, np.int32)
    if not isinstance(some, np.ndarray) or not masks.is_static(mask):
        return which, (None,)
    found = {}
    open_tiles = is_open.repeat(blocks.open_q // blocks.masked_q, -2)
    open_tiles = open_tiles.repeat(blocks.open_k // blocks.masked_k, -1)
    for place in np.argwhere(some & ~open_tiles).tolist():
        _, i, j, q, k = place
        t = q_offset + i * blocks.macro_q + q * blocks.masked_q
        s = j * blocks.macro_k + k * blocks.masked_k
        part = mask.within(
            masks.Interval(t, t + blocks.masked_q - 1),
            masks.Interval(s, min(s + blocks.masked_k, num_keys) - 1),
        )
        which[tuple(place)] = found.setdefault(part, len(found))
    if len(found) > _MAX_MASKS:
        return np.zeros_like(which), (mask,)
    # Open tiles that are left over join the first list, whose mask holds there as well.
    return which, tuple(found) or (mask,)


def _tiles_by_macro(
    mask: masks.Mask,
    num_queries: int,
    num_keys: int,
    blocks: Blocks,
    q_offset: Any,
    flat_from: tuple[int, int] | None,
) -> tuple[Any, Any]:
    """Returns which small tiles are visited and which large ones are open, by macro block.

    Both are [1 or B, macro q, macro k, tiles of q, tiles of k].
    """
    sizes = blocks.masked_q, blocks.masked_k
    some, every = masks.block_bounds(mask, num_queries, num_keys, *sizes, q_offset)
    xp = np if isinstance(some, np.ndarray) else jnp
    rows, *shape = some.shape
    # Past the ends lies anything at all: a cut tile is masked, whatever the mask.
    whole_q = (np.arange(shape[0]) + 1) * sizes[0] <= num_queries
    whole_k = (np.arange(shape[1]) + 1) * sizes[1] <= num_keys
    every = every & some & whole_q[:, None] & whole_k
    if flat_from is not None:
        least = q_offset + (np.arange(shape[0]) * sizes[0])[:, None]
        least = least - np.arange(shape[1]) * sizes[1] - (sizes[1] - 1)
        greatest = least + sizes[0] + sizes[1] - 2
        every = every & ((least >= flat_from[0]) | (greatest <= -flat_from[1]))
    per_macro = blocks.macro_q // sizes[0], blocks.macro_k // sizes[1]

    def by_macro(x):
        x = xp.pad(x, ((0, 0), (0, -shape[0] % per_macro[0]), (0, -shape[1] % per_macro[1])))
        x = x.reshape(rows, -1, per_macro[0], x.shape[-1] // per_macro[1], per_macro[1])
        return x.swapaxes(2, 3)

    some, every = by_macro(some), by_macro(every)
    per_open = blocks.open_q // sizes[0], blocks.open_k // sizes[1]
    large = (per_macro[0] // per_open[0], per_open[0], per_macro[1] // per_open[1], per_open[1])
    return some, every.reshape(*every.shape[:3], *large).all((-3, -1))


def _listed(x: Any) -> Any:
    """Returns [..., i, j] as a list in which i runs faster: keys stay while queries change."""
    return x.swapaxes(-1, -2).reshape(*x.shape[:-2], -1)


def _compacted(xp: Any, is_in: Any, num_i: int) -> Any:
    """Returns the codes of the tiles that are in the list, first and in order."""
    order = xp.argsort(~is_in, axis=-1, stable=True)
    return order % num_i | (order // num_i) << 16


def _order(is_used: np.ndarray, is_q_outer: bool) -> list[tuple[int, int]]:
    """Returns the macro blocks to visit. A block of rows that nothing visits is visited all the
    same, with empty lists: its zeros must be written."""
    used = set(map(tuple, np.argwhere(is_used).tolist()))
    used |= {(int(i), 0) for i in np.flatnonzero(~is_used.any(1))}
    used |= {(0, int(j)) for j in np.flatnonzero(~is_used.any(0))}
    return sorted(used, key=lambda pair: pair if is_q_outer else pair[::-1])


def _static_columns(order: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Returns the columns that the order of the visits tells alone."""
    at_i, at_j = (np.asarray(x, np.int32) for x in zip(*order))
    number = np.arange(len(order))

    def marks(blocks):
        first = np.asarray([np.flatnonzero(blocks == block)[0] for block in blocks]) == number
        last = np.asarray([np.flatnonzero(blocks == block)[-1] for block in blocks]) == number
        return first, last

    (first_k, last_k), (first_q, last_q) = marks(at_j), marks(at_i)
    is_all_done = number > np.flatnonzero(last_q)[-1]
    flags = first_k * FIRST_K | last_k * LAST_K | first_q * FIRST_Q | last_q * LAST_Q
    flags |= is_all_done * ALL_Q_DONE
    # Written as they are completed: every step names the block that is completed next.
    ends = np.flatnonzero(last_q)
    following = ends[np.minimum(np.searchsorted(ends, number), len(ends) - 1)]
    return {
        "q_block": at_i,
        "k_block": at_j,
        "flags": flags,
        "dq_block": at_i[following],
    }
