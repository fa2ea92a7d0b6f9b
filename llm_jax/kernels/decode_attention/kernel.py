"""The body of the decode kernel; `pallas` says how the arrays lie.

One program walks the rows of the batch, and the blocks of each row's visible pages. Two more cursors
run ahead over the same walk, across the ends of rows: one starts the copies of a block's pages into a
ring of buffers, so that the memory is never idle; one block ahead the other computes scores, which the
matrix unit has done by the time that the softmax asks for them.
"""

import dataclasses
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import scores as scores_lib


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernel knows when it is compiled.

    Attributes:
      num_rows, rows: of the batch, and of one program.
      num_queries: T.
      page: slots that are copied at a time.
      pages: in a block, which is computed at a time.
      pages_per_row: that there is room for.
      num_pages: of a cache in pages; None for a contiguous one.
      ring: buffers of a block.
      lag: packs whose weights are under way before the first sum of values.
      packs, heads: how many matrix products a block takes, and key heads in each.
      softcap, window: as in `op.attention`.
    """

    num_rows: int
    rows: int
    num_queries: int
    page: int
    pages: int
    pages_per_row: int
    num_pages: int | None
    ring: int
    lag: int
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
        begin = lax.div(jnp.maximum(first, 0), page)
        end = jnp.minimum(lax.div(length + page - 1, page), static.pages_per_row)
        return begin, jnp.maximum(end, begin)

    def num_blocks(self, row):
        """Returns the blocks of a row: at least one, so that a row of nothing is written too."""
        begin, end = self.pages(row)
        return jnp.maximum(lax.div(end - begin + self.static.pages - 1, self.static.pages), 1)

    def base(self, cursor):
        """Returns the first slot of a block."""
        row, block = cursor
        return (self.pages(row)[0] + block * self.static.pages) * self.static.page

    def is_inside(self, cursor):
        """Returns whether there is such a block."""
        return cursor[0] < self.end

    def after(self, cursor):
        """Returns the cursor of the next block: of the row, or the first of the next."""
        row, block = cursor
        is_last = block + 1 >= self.num_blocks(row)
        return jnp.where(is_last, row + 1, row), jnp.where(is_last, 0, block + 1)

    def _copies(self, row, page, slot, place):
        """Yields the copies of one page to its place in a buffer."""
        static, refs = self.static, self.refs
        at = pl.ds(pl.multiple_of(place * static.page, static.page), static.page)
        if static.num_pages is None:
            where = row, pl.ds(pl.multiple_of(page * static.page, static.page), static.page)
        else:
            index = refs["table"][row * static.pages_per_row + page]
            where = jnp.clip(index, 0, static.num_pages - 1), slice(None)
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

    def _each_page(self, cursor, slot, of_page, of_whole):
        """Calls `of_whole` for a block of all its pages, else `of_page` for each that there is."""
        row, block = cursor
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

    def start(self, cursor, slot):
        """Starts the copies of a block, if there is one."""

        def of_whole(at_place):
            for place in range(self.static.pages):
                at_place(place)

        @pl.when(self.is_inside(cursor))
        def _():
            self._each_page(cursor, slot, lambda copy: copy.start(), of_whole)

    def wait(self, cursor, slot):
        """Waits for the copies of a block, if there is one."""

        def of_whole(at_place):
            del at_place
            for n, name in enumerate(("kv", "scales")):
                if name in self.refs:  # a semaphore counts bytes: one wait for all
                    buffer = self.refs[name + "_buffer"].at[slot]
                    pltpu.make_async_copy(buffer, buffer, self.refs["sems"].at[n, slot]).wait()

        @pl.when(self.is_inside(cursor))
        def _():
            self._each_page(cursor, slot, lambda copy: copy.wait(), of_whole)


class _Block:
    """What is done to the keys or to the values of one block, for one pack of heads at a time."""

    def __init__(self, static: Static, refs, walk: _Walk, cursor, slot):
        self.static, self.refs, self.slot = static, refs, slot
        self.row = jnp.minimum(cursor[0], walk.end - 1)  # past the end scores are of no use
        self.at = self.row - walk.begin
        self.base = walk.base(cursor)
        self.rows, self.width = refs["q"].shape[2:]
        self.first, self.length = refs["starts"][self.row], refs["lengths"][self.row]

    def slots(self):
        """Returns the slots of queries and keys, int32 [R, 1] and [R, S]."""
        t_R1 = self.length - self.static.num_queries + self.refs["query"][:, :1]
        shape = self.rows, self.static.block
        return t_R1, self.base + lax.broadcasted_iota(jnp.int32, shape, 1)

    def allowed(self):
        """Returns which queries see which keys, [R, S]."""
        t_R1, s_RS = self.slots()
        allowed_RS = (s_RS <= t_R1) & (s_RS >= self.first)
        if self.static.window is not None:
            allowed_RS &= s_RS > t_R1 - self.static.window
        return allowed_RS

    def is_row(self):
        """Returns which slots are the row's, [S, W]."""
        s_SW = self.base + lax.broadcasted_iota(jnp.int32, (self.static.block, self.width), 0)
        return (s_SW >= self.first) & (s_SW < self.length)

    def has_gaps(self):
        """Returns whether some slots are not the row's, or were not copied."""
        return (self.base < self.first) | (self.base + self.static.block > self.length)

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

    def scores(self, j: int, allowed_RS):
        """Puts the scores of a pack, to the base 2, into their buffer."""
        static = self.static
        x_RS = scores_lib.dot(self.refs["q"][self.at, j], self._operand(0, j), ((1,), (1,)))
        x_RS = self._scaled(x_RS, 0, j)
        if static.softcap is not None:
            x_RS = jnp.tanh(x_RS / static.softcap) * (static.softcap * scores_lib.LOG2E)
        if "slopes" in self.refs:
            t_R1, s_RS = self.slots()
            x_RS += self.refs["slopes"][j][:, :1] * (s_RS - t_R1).astype(jnp.float32)
        # Keys that were not copied hold anything, NaN too.
        self.refs["x"][j] = jnp.where(allowed_RS, x_RS, scores_lib.MASKED)

    def softmax(self, j: int, allowed_RS):
        """Returns the weights of a pack, and the factor for what came before."""
        refs, x_RS = self.refs, self.refs["x"][j]
        old = refs["m"][j]
        m = jnp.maximum(old, jnp.max(x_RS, axis=1, keepdims=True))
        p_RS = jnp.exp2(x_RS - m[:, :1])
        alpha = jnp.exp2(old - m)
        refs["m"][j] = m
        refs["l"][j] = alpha * refs["l"][j] + jnp.sum(p_RS, axis=1, keepdims=True)
        if "scales" in refs:
            p_RS = self._scaled(p_RS, 1, j)
            p_RS = p_RS if allowed_RS is None else jnp.where(allowed_RS, p_RS, 0.0)
        return p_RS.astype(refs["q"].dtype), alpha

    def values(self, j: int, p_RS, alpha, is_row_SW):
        """Adds the weighted sum of values."""
        v_SW = self._operand(1, j)
        if is_row_SW is not None:  # a weight of zero times NaN is NaN
            v_SW = jnp.where(is_row_SW, v_SW, jnp.zeros_like(v_SW))
        o_RW = scores_lib.dot(p_RS, v_SW, ((1,), (0,)))
        self.refs["acc"][j] = self.refs["acc"][j] * alpha[:, :1] + o_RW


def _emit(this: _Block, following: _Block, has_gaps: bool):
    """Emits softmax and values of one block and scores of the next; the order is the pipeline."""
    allowed_RS = this.allowed() if has_gaps else None
    is_row_SW = this.is_row() if has_gaps else None
    following_RS = following.allowed()
    p, packs, lag = {}, range(this.static.packs), this.static.lag
    for n in range(len(packs) + lag):
        if n in packs:
            p[n] = this.softmax(n, allowed_RS)
            following.scores(n, following_RS)
        if n - lag in packs:
            this.values(n - lag, *p.pop(n - lag), is_row_SW)


def _begin(refs):
    """Sets maximum, sum and output to what they are before any key, or after the sink alone."""
    has_sinks = "sinks" in refs
    empty = jnp.full_like(refs["m"], scores_lib.EMPTY)
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

    def ring(slot):
        return jnp.where(slot >= static.ring, slot - static.ring, slot)

    first = ahead = walk.begin, jnp.int32(0)
    for slot in range(static.ring - 1):
        walk.start(ahead, slot)
        ahead = walk.after(ahead)
    walk.wait(first, 0)
    block = _Block(static, refs, walk, first, 0)
    for j in range(static.packs):
        block.scores(j, block.allowed())

    def of_row(row, carry):
        _begin(refs)

        def of_block(block, carry):
            slot, *ahead = carry
            cursor = row, block
            following = walk.after(cursor)
            walk.start(ahead, ring(slot + static.ring - 1))
            walk.wait(following, ring(slot + 1))
            this = _Block(static, refs, walk, cursor, slot)
            that = _Block(static, refs, walk, following, ring(slot + 1))
            has_gaps = this.has_gaps()
            pl.when(has_gaps)(lambda: _emit(this, that, True))
            pl.when(~has_gaps)(lambda: _emit(this, that, False))
            return ring(slot + 1), *walk.after(ahead)

        carry = lax.fori_loop(0, walk.num_blocks(row), of_block, carry)
        _finish(refs, row - walk.begin)
        return carry

    lax.fori_loop(walk.begin, walk.end, of_row, (jnp.int32(0), *ahead))
