"""The body of the decode kernel; `pallas` says how the arrays lie.

One program walks the rows of the batch, and the blocks of each row's visible pages. A second cursor
runs some blocks ahead over the same walk, across rows, and starts the copies of their pages into a ring
of buffers, so that the memory never waits for the end of a row.
"""

import dataclasses
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import scores as scores_lib

# The maximum before any key, and the score of a masked pair: exp2(_MASKED - _EMPTY) is 0.
_EMPTY = -1e30
_MASKED = -3e38


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernel knows when it is compiled.

    Attributes:
      num_rows, rows: of the batch, and of one program.
      num_queries: T.
      page: slots that are copied at a time.
      pages: in a block, which is computed at a time.
      pages_per_row: of the table; None for a cache without one.
      ring: buffers of a block.
      lead: heads whose scores are under way before the first softmax.
      packs, heads: how many matrix products a block takes, and key heads in each.
      softcap, window: as in `op.attention`.
    """

    num_rows: int
    rows: int
    num_queries: int
    page: int
    pages: int
    pages_per_row: int | None
    ring: int
    lead: int
    packs: int
    heads: int
    softcap: float | None
    window: int | None

    @property
    def block(self) -> int:
        return self.page * self.pages


class _Walk:
    """Which pages of which rows, in which order, and their copies."""

    def __init__(self, static: Static, refs: dict[str, Any]):
        self.static, self.refs = static, refs
        self.begin = pl.program_id(0) * static.rows
        self.end = jnp.minimum(self.begin + static.rows, static.num_rows)

    def pages(self, row):
        """Returns the first page that some query of a row may see, and the page after the last."""
        static, page = self.static, self.static.page
        row = jnp.minimum(row, static.num_rows - 1)
        first, length = self.refs["starts"][row], self.refs["lengths"][row]
        if static.window is not None:
            first = jnp.maximum(first, length - static.num_queries - static.window + 1)
        begin, end = lax.div(first, page), lax.div(length + page - 1, page)
        return begin, jnp.maximum(end, begin)

    def num_blocks(self, row):
        """Returns the blocks of a row: at least one, so that a row of nothing is written too."""
        begin, end = self.pages(row)
        return jnp.maximum(lax.div(end - begin + self.static.pages - 1, self.static.pages), 1)

    def base(self, row, block):
        """Returns the first slot of a block."""
        return (self.pages(row)[0] + block * self.static.pages) * self.static.page

    def _copies(self, row, page, slot, place):
        """Yields the copies of one page to its place in a buffer."""
        static, refs = self.static, self.refs
        at = pl.ds(pl.multiple_of(place * static.page, static.page), static.page)
        if static.pages_per_row is None:
            where = row, pl.ds(pl.multiple_of(page * static.page, static.page), static.page)
        else:
            where = refs["table"][row * static.pages_per_row + page], slice(None)
        for n, name in enumerate(("kv", "scales")):
            if name in refs:
                index, slots = where
                # Slots are the last but one dimension of the keys, the last of the scales.
                tail = (slice(None),) if name == "kv" else ()
                yield pltpu.make_async_copy(
                    refs[name].at[(index, slice(None), *((slice(None),) * n), slots, *tail)],
                    refs[name + "_buffer"].at[
                        (slot, slice(None), *((slice(None),) * n), at, *tail)
                    ],
                    refs["sems"].at[n, slot],
                )

    def _each_page(self, row, block, slot, of_page, of_whole):
        """Calls `of_whole` for a block of all its pages, else `of_page` for each that there is."""
        begin, end = self.pages(row)
        begin = begin + block * self.static.pages
        count = jnp.minimum(end - begin, self.static.pages)

        def at_place(place, _=None):
            for copy in self._copies(row, begin + place, slot, place):
                of_page(copy)

        @pl.when(count == self.static.pages)
        def _():
            of_whole(at_place)

        @pl.when(count < self.static.pages)
        def _():
            lax.fori_loop(0, count, at_place, None)

    def start(self, row, block, slot):
        """Starts the copies of a block."""

        def of_whole(at_place):
            for place in range(self.static.pages):
                at_place(place)

        self._each_page(row, block, slot, lambda copy: copy.start(), of_whole)

    def wait(self, row, block, slot):
        """Waits for the copies of a block."""

        def of_whole(at_place):
            del at_place
            for n, name in enumerate(("kv", "scales")):
                if name in self.refs:  # a semaphore counts bytes: one wait for all
                    buffer = self.refs[name + "_buffer"].at[slot]
                    pltpu.make_async_copy(buffer, buffer, self.refs["sems"].at[n, slot]).wait()

        self._each_page(row, block, slot, lambda copy: copy.wait(), of_whole)

    def fetch(self, cursor, slot):
        """Starts the copies of the block that a cursor is at; returns the next cursor."""
        row, block = cursor
        pl.when(row < self.end)(lambda: self.start(row, block, slot))
        is_last = block + 1 >= self.num_blocks(row)
        return jnp.where(is_last, row + 1, row), jnp.where(is_last, 0, block + 1)


class _Block:
    """Attends to the keys in one buffer; each method one stage for one pack of heads."""

    def __init__(self, static: Static, refs, place, is_masked: bool):
        self.static, self.refs, self.is_masked = static, refs, is_masked
        self.row, self.at, self.slot, self.base = place
        self.rows = refs["q"].shape[2]
        self.width = refs["q"].shape[3]
        self.last = refs["lengths"][self.row] - static.num_queries
        self.first = refs["starts"][self.row]
        if is_masked:
            self.allowed_RS = self._allowed()
            s_SW = self.base + lax.broadcasted_iota(jnp.int32, (static.block, self.width), 0)
            length = refs["lengths"][self.row]
            self.is_key_SW = (s_SW >= self.first) & (s_SW < length)

    def _slots(self):
        """Returns the slots of queries and keys, int32 [R, 1] and [R, S]."""
        t_R1 = self.last + self.refs["query"][:, :1]
        shape = self.rows, self.static.block
        return t_R1, self.base + lax.broadcasted_iota(jnp.int32, shape, 1)

    def _allowed(self):
        t_R1, s_RS = self._slots()
        allowed_RS = (s_RS <= t_R1) & (s_RS >= self.first)
        if self.static.window is not None:
            allowed_RS &= s_RS > t_R1 - self.static.window
        return allowed_RS

    def _operand(self, which: int, j: int):
        at = slice(j * self.width, (j + 1) * self.width)
        return self.refs["kv_buffer"][self.slot, which, :, at].astype(self.refs["q"].dtype)

    def _scaled(self, x_RS, which: int, j: int):
        """Returns scores or weights times what one unit of an int8 key or value is worth."""
        if "scales" not in self.refs:
            return x_RS
        heads = range(j * self.static.heads, (j + 1) * self.static.heads)
        scales = [self.refs["scales_buffer"][self.slot, which, h : h + 1, :] for h in heads]
        factor = scales[0]
        for n, scale_1S in enumerate(scales[1:], 1):
            factor = jnp.where(self.refs["head"][:, :1] == n, scale_1S, factor)
        return x_RS * factor

    def scores(self, j: int):
        """Stage 1: scores to the base 2."""
        static = self.static
        x_RS = scores_lib.dot(self.refs["q"][self.at, j], self._operand(0, j), ((1,), (1,)))
        x_RS = self._scaled(x_RS, 0, j)
        if static.softcap is not None:
            x_RS = jnp.tanh(x_RS / static.softcap) * (static.softcap * scores_lib.LOG2E)
        if "slopes" in self.refs:
            t_R1, s_RS = self._slots()
            x_RS += self.refs["slopes"][j][:, :1] * (s_RS - t_R1).astype(jnp.float32)
        # Keys that were not copied hold anything, NaN too.
        return jnp.where(self.allowed_RS, x_RS, _MASKED) if self.is_masked else x_RS

    def softmax(self, j: int, x_RS):
        """Stage 2: weights, and the factor for what came before."""
        refs = self.refs
        old = refs["m"][j]
        m = jnp.maximum(old, jnp.max(x_RS, axis=1, keepdims=True))
        p_RS = jnp.exp2(x_RS - m[:, :1])
        alpha = jnp.exp2(old - m)
        refs["m"][j] = m
        refs["l"][j] = alpha * refs["l"][j] + jnp.sum(p_RS, axis=1, keepdims=True)
        if "scales" in refs:
            p_RS = self._scaled(p_RS, 1, j)
            p_RS = jnp.where(self.allowed_RS, p_RS, 0.0) if self.is_masked else p_RS
        return p_RS.astype(refs["q"].dtype), alpha

    def values(self, j: int, p_RS, alpha):
        """Stage 3: the weighted sum of values."""
        v_SW = self._operand(1, j)
        if self.is_masked:  # a weight of zero times NaN is NaN
            v_SW = jnp.where(self.is_key_SW, v_SW, jnp.zeros_like(v_SW))
        o_RW = scores_lib.dot(p_RS, v_SW, ((1,), (0,)))
        self.refs["acc"][j] = self.refs["acc"][j] * alpha[:, :1] + o_RW

    def emit(self):
        """Emits all stages; their order is the software pipeline."""
        x, p = {}, {}
        packs, lead = range(self.static.packs), self.static.lead
        for n in range(len(packs) + 2 * lead):
            if n in packs:
                x[n] = self.scores(n)
            if n - lead in packs:
                p[n - lead] = self.softmax(n - lead, x.pop(n - lead))
            if n - 2 * lead in packs:
                self.values(n - 2 * lead, *p.pop(n - 2 * lead))


def _attend(static: Static, refs, row, at, slot, base):
    """Attends to a block: without masks where every query sees all of it."""
    low, last = refs["starts"][row], refs["lengths"][row] - static.num_queries
    if static.window is not None:
        low = jnp.maximum(low, last + static.num_queries - static.window)
    is_whole = (base >= low) & (base + static.block - 1 <= last)
    place = row, at, slot, base
    pl.when(is_whole)(lambda: _Block(static, refs, place, is_masked=False).emit())
    pl.when(~is_whole)(lambda: _Block(static, refs, place, is_masked=True).emit())


def _begin(refs):
    """Sets maximum, sum and output to what they are before any key, or after the sink alone."""
    has_sinks = "sinks" in refs
    empty = jnp.full_like(refs["m"], _EMPTY)
    refs["m"][...] = refs["sinks"][...] if has_sinks else empty
    refs["l"][...] = jnp.full_like(refs["l"], 1.0 if has_sinks else 0.0)
    refs["acc"][...] = jnp.zeros_like(refs["acc"])


def _finish(refs, at):
    l_JR = refs["l"][...]
    inverse = jnp.where(l_JR > 0.0, 1.0 / l_JR, 0.0)
    refs["o"][at] = (refs["acc"][...] * inverse[..., :1]).astype(refs["o"].dtype)


def kernel(*refs, static: Static, names: tuple[str, ...]):
    refs = dict(zip(names, refs, strict=True))
    walk = _Walk(static, refs)
    cursor = walk.begin, jnp.int32(0)
    for slot in range(static.ring - 1):
        cursor = walk.fetch(cursor, slot)

    def of_row(row, carry):
        at = row - walk.begin
        _begin(refs)

        def of_block(block, carry):
            slot, *cursor = carry
            cursor = walk.fetch(cursor, jnp.where(slot == 0, static.ring - 1, slot - 1))
            walk.wait(row, block, slot)
            _attend(static, refs, row, at, slot, walk.base(row, block))
            return jnp.where(slot == static.ring - 1, 0, slot + 1), *cursor

        carry = lax.fori_loop(0, walk.num_blocks(row), of_block, carry)
        _finish(refs, at)
        return carry

    lax.fori_loop(walk.begin, walk.end, of_row, (jnp.int32(0), *cursor))
