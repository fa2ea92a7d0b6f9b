"""Which tiles the backward kernel visits, as tables of integers.

The grid walks macro blocks; inside one, loops walk lists of tiles. Open tiles, without mask
arithmetic, are large and come several at a time; what is left over joins the masked tiles, small ones,
which is correct (a mask is never wrong) and only slower.
"""

import dataclasses
from typing import Any

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

    macro_q: int = 4096
    macro_k: int = 4096
    open_q: int = 512
    open_k: int = 512
    masked_q: int = 512
    masked_k: int = 512
    open_unroll: int = 4
    masked_unroll: int = 2
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


@dataclasses.dataclass(frozen=True)
class Visits:
    """Tables [rows * num_visits] of the macro visits, and the lists of tiles that they point into.

    Attributes:
      columns: int32, by name. `q_block` and `k_block` of the visit, `flags`; `open_start` and
        `open_turns`, `masked_start`, `masked_turns` and `masked_rest` in `tiles`; and `dq_block`, which
        is completed next.
      tiles: int32, `i | j << 16` in units of their own size, within the macro block.
      num_visits: of each row of the tables.
      is_per_row: whether each row of the batch has its own.
    """

    columns: dict[str, Any]
    tiles: Any
    num_visits: int
    is_per_row: bool


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
    some, is_open = _tiles_by_macro(mask, num_queries, num_keys, blocks, q_offset, flat_from)
    xp = np if isinstance(some, np.ndarray) else jnp
    num_rows, num_i, num_j = some.shape[:3]
    # What is visited must be known now; arrays of the program may visit anything.
    is_known = xp is np and not is_everywhere
    is_used = some.any((0, -2, -1)) if is_known else np.ones((num_i, num_j), bool)
    order = _order(is_used, is_q_outer)
    at_i, at_j = (np.asarray(x) for x in zip(*order))
    some, is_open = some[:, at_i, at_j], is_open[:, at_i, at_j]

    # Open tiles as whole turns; the others are left to the masked list, tile by small tile.
    count = xp.sum(is_open, (-2, -1))
    kept = count - count % blocks.open_unroll
    rank = xp.cumsum(_listed(is_open), -1)
    listed = _listed(is_open) & (rank <= kept[..., None])
    taken = xp.swapaxes(listed.reshape(*is_open.shape[:2], *is_open.shape[:1:-1]), -1, -2)
    ratio = blocks.open_q // blocks.masked_q, blocks.open_k // blocks.masked_k
    taken = xp.repeat(xp.repeat(taken, ratio[0], -2), ratio[1], -1)
    is_masked = _listed(some & ~taken)
    num_masked = xp.sum(is_masked, -1)
    tiles = xp.concatenate(
        [
            _compacted(xp, listed, is_open.shape[-2]),
            _compacted(xp, is_masked, some.shape[-2]),
        ],
        -1,
    )
    start = np.arange(num_rows * len(order)).reshape(num_rows, -1) * tiles.shape[-1]
    columns = _static_columns(order) | {
        "open_start": start,
        "open_turns": kept // blocks.open_unroll,
        "masked_start": start + listed.shape[-1],
        "masked_turns": num_masked // blocks.masked_unroll,
        "masked_rest": num_masked % blocks.masked_unroll,
    }

    def flat(table):
        return xp.broadcast_to(table, (num_rows, len(order))).reshape(-1).astype(np.int32)

    return Visits(
        {name: flat(table) for name, table in columns.items()},
        tiles.reshape(-1).astype(np.int32),
        len(order),
        num_rows > 1,
    )


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
