"""The body of the forward kernel; `forward` says how the work lies."""

import dataclasses
import functools
import math

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import diagonals
from llm_jax.kernels.flash_attention import forward_visits
from llm_jax.kernels.flash_attention import scores as scores_lib

# Rows of ones below v^T, as many as a register of bfloat16 has: their product with the probabilities is
# the sum of those, which the matrix unit has room for and the vector unit has not.
ONES = 16


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernel knows when it is compiled."""

    blocks: forward_visits.Blocks
    visits: forward_visits.Visits
    parts: scores_lib.Parts
    operands: tuple[scores_lib.Operand, ...]
    num_keys: int
    group: int

    @property
    def has_rest(self) -> bool:
        """Whether VMEM may hold keys past the end."""
        past = self.visits.num_past
        return self.visits.span > self.num_keys if past is None else past > 0

    @property
    def is_seen_once(self) -> bool:
        """Whether each span is seen by one visit, so that nothing is gained by preparing it."""
        is_single = all(kind.is_first and kind.is_last for kind in self.visits.kinds)
        return is_single and self.visits.num_past is not None

    @property
    def terms(self) -> tuple[diagonals.Diagonals, ...]:
        """Of a bias by distance, that for chunks."""
        return self.parts.bias if isinstance(self.parts.bias, tuple) else ()

    @property
    def changes_scores(self) -> bool:
        """Whether scores are changed before the softmax, apart from scale and mask."""
        return self.parts.softcap is not None or self.parts.bias is not None


class _Tile:
    """The running values of one tile of queries during a visit."""

    def __init__(self):
        self.q = self.m = self.l = self.o = self.alpha = None
        self.p = {}


class _Visit:
    """Emits the visit of key block `kv[n]` by query block `i`; each method one stage of one tile."""

    def __init__(self, static: Static, kind: forward_visits.Kind, refs, n, place):
        self.static, self.blocks, self.refs, self.n = static, static.blocks, refs, n
        self.b, self.h, self.i, self.origin = place
        self.pattern, self.is_first, self.is_last, self.is_own = kind
        self.tiles, self.transposed = [_Tile() for _ in self.pattern], set()
        # Last tile first: it has most work at a causal edge, so the scores that the visit before
        # has issued for it are needed.
        self.order = list(range(len(self.pattern)))[::-1]
        # Visits of fewer chunks have more slots in the same buffers.
        self.num_chunks, per_slot = len(self.pattern[0]), self.blocks.kv // self.blocks.chunk
        slots = self.blocks.slots * per_slot // self.num_chunks
        self.slot = {r: x % slots for x, r in enumerate(self.order)}
        self.work = {
            r: [c for c, part in enumerate(self.pattern[r]) if part != forward_visits.SKIP]
            for r in self.order
        }

        # The first keys of the chunks, in the array; `origin` is the first one in VMEM.
        base = None if self.is_own else self._base(n)
        self.starts = {
            (r, c): self._own_start(r, c) if self.is_own else base + c * self.blocks.chunk
            for r, of_tile in self.work.items()
            for c in of_tile
        }

    def _base(self, n):
        return self.refs["kv"][n] * self.blocks.chunk

    def _own_start(self, r: int, c: int):
        chunk, tiles, own = self.blocks.chunk, len(self.pattern), self.blocks.own
        number = forward_visits.per_word(self.static.visits.span // chunk)
        words = -(-own // number)
        word = self.refs["units"][(self.n * tiles + r) * words + c // number]
        bits = 32 // number
        index = lax.shift_right_logical(word, c % number * bits) & ((1 << bits) - 1)
        return self.origin + index * chunk

    def _next_base(self):
        """Where the next visit begins. If that is in another span its scores come to nothing here."""
        base = self._base(self.n + 1)
        if self.static.visits.num_past is None:
            return base
        last = self.static.visits.span - self.blocks.kv
        return self.origin + jnp.clip(base - self.origin, 0, last)

    def begin(self):
        """Issues the scores that a visit before this one would have issued."""
        for c in range(self.blocks.kv // self.blocks.chunk):
            start = self._base(self.n) + c * self.blocks.chunk
            self.buffer(0, c)[...] = self.product(self.order[0], start)

    def queries(self, r: int) -> slice:
        return slice(r * self.blocks.tile, (r + 1) * self.blocks.tile)

    def keys(self, start):
        chunk = self.blocks.chunk
        return pl.ds(pl.multiple_of(start - self.origin, chunk), chunk)

    def buffer(self, slot: int, c: int):
        slot, c = divmod(slot * self.num_chunks + c, self.blocks.kv // self.blocks.chunk)
        rows = slice(c * self.blocks.chunk, (c + 1) * self.blocks.chunk)
        return self.refs["scores"].at[slot, rows, :]

    def query(self, r: int):
        """Scaled queries of a tile: made in the first visit, kept for the others."""
        tile, refs = self.tiles[r], self.refs
        if tile.q is None and self.is_first:
            q_RC = refs["q"][0, 0, self.queries(r), :]
            tile.q = (q_RC.astype(jnp.float32) * self.static.parts.query_factor).astype(q_RC.dtype)
            if not self.is_last:
                refs["q_scaled"][self.queries(r), :] = tile.q
        elif tile.q is None:
            tile.q = refs["q_scaled"][self.queries(r), :]
        return tile.q

    def product(self, r: int, start):
        return scores_lib.dot(self.refs["k"][self.keys(start), :], self.query(r), ((1,), (1,)))

    def transpose(self, r: int, c: int):
        """Where keys are seen by one visit alone, v^T is made by it, along with all else."""
        if not self.static.is_seen_once or c in self.transposed:
            return
        self.transposed.add(c)
        start = self.starts[r, c]
        at, left = self.keys(start), self.static.num_keys - start
        v_SC = _inside(self.static, self.refs["v"][at, :], left)
        self.refs["v_t"][: v_SC.shape[1], at] = v_SC.T

    def scores(self, r: int, c: int):
        """Stage 1: the scores of a chunk into their buffer, and their maximum."""
        self.transpose(r, c)
        tile, is_masked = self.tiles[r], self.pattern[r][c] >= forward_visits.PART
        buffer, new = self.buffer(self.slot[r], c), None
        if r == self.order[0] and not self.is_first and not self.is_own:
            x_SR = buffer[...]  # issued by the visit before, as they come
        else:
            x_SR = new = self.product(r, self.starts[r, c])
        if is_masked or self.static.changes_scores:
            x_SR = new = self.adjusted(x_SR, r, c, is_masked)
        if new is not None:
            buffer[...] = new
        top = jnp.max(x_SR, axis=0, keepdims=True)
        shift = self.shift(r, c)
        if shift is not None:
            top += shift
        tile.m = top if tile.m is None else jnp.maximum(tile.m, top)

    def indices(self, r: int, c: int):
        """Returns the places of a chunk's queries and keys in their arrays, int32 [keys, queries]."""
        shape = (self.blocks.chunk, self.blocks.tile)
        k_index = self.starts[r, c] + lax.broadcasted_iota(jnp.int32, shape, 0)
        q_start = self.i * self.blocks.q + r * self.blocks.tile
        return q_start + lax.broadcasted_iota(jnp.int32, shape, 1), k_index

    def rows(self, r: int):
        """Returns the places of a tile's queries, int32 [1, queries]."""
        q_start = self.i * self.blocks.q + r * self.blocks.tile
        return q_start + lax.broadcasted_iota(jnp.int32, (1, self.blocks.tile), 1)

    def parts(self, r: int, c: int) -> scores_lib.Parts:
        """Returns mask, bias and dropout around the pieces of this chunk."""

        def piece(operand):
            ref = self.refs[operand.name]
            if operand.dims == "BT":
                return ref[0, :, self.queries(r)]
            if operand.dims == "BS":
                row_1S = ref[0, :, self.keys(self.starts[r, c])]
                return scores_lib.column(row_1S, self.blocks.tile)
            if operand.dims in ("HNX", "BKGTS"):
                return ref
            return ref[{"B": self.b, "H": self.h, "": 0}[operand.dims]]

        return scores_lib.rebuilt(self.static.parts, self.static.operands, piece)

    def adjusted(self, x_SR, r: int, c: int, is_masked: bool):
        """Returns scores, to the base 2, after soft-cap, bias and, in masked parts, the mask."""
        parts = self.parts(r, c)
        x_SR, _ = parts.capped(x_SR)
        if isinstance(parts.bias, biases.Full):
            bias_RS = parts.bias.bias_BKGTS[self.queries(r), self.keys(self.starts[r, c])]
            x_SR += diagonals.transposed(bias_RS)
        elif parts.bias is not None:
            x_SR += self.refs["bias_tiles"][self.bias_place(parts, r, c)[0]]
        if not is_masked:
            return x_SR
        _, s = self.indices(r, c)
        masks, row = self.static.visits.part_masks, parts.slots(self.rows(r))
        mask = masks[self.pattern[r][c] - forward_visits.PART] if masks else parts.mask
        is_allowed = mask.allowed(row, s)
        if self.static.has_rest:  # keys past the end hold anything, NaN too
            is_allowed &= s < self.static.num_keys
        return jnp.where(is_allowed, x_SR, scores_lib.MASKED)

    def bias_place(self, parts, r: int, c: int):
        """Returns which tile of the bias a chunk needs, and how many steps past it the chunk lies."""
        q_start = self.i * self.blocks.q + r * self.blocks.tile
        return parts.bias[0].place(q_start, self.starts[r, c])

    def shift(self, r: int, c: int):
        """Returns what the scores of a whole chunk lack, a scalar, or None for nothing."""
        terms = self.static.terms
        if not terms or terms[0].slopes_H is None:
            return None
        parts = self.parts(r, c)
        return parts.bias[0].shift(self.bias_place(parts, r, c)[1])

    def before(self):
        """Maximum and sum before the first key: of nothing, or of the sink, a key without a value."""
        if "sinks" not in self.refs:
            return scores_lib.EMPTY, 0.0
        return self.refs["sinks"][self.h] * scores_lib.LOG2E, 1.0

    def maximum(self, r: int):
        """Stage 2: the new running maximum, and the factor for what came before."""
        tile, at = self.tiles[r], self.queries(r)
        old = self.before()[0] if self.is_first else self.refs["m"][:, at]
        tile.m = jnp.maximum(tile.m, old)
        if not self.is_first or "sinks" in self.refs:
            tile.alpha = jnp.exp2(old - tile.m)
        if not self.is_last:
            self.refs["m"][:, at] = tile.m

    def softmax(self, r: int, c: int):
        """Stage 3: the probabilities of a chunk."""
        tile, shift = self.tiles[r], self.shift(r, c)
        top = tile.m if shift is None else tile.m - shift
        p_SR = jnp.exp2(self.buffer(self.slot[r], c)[...] - top)
        if self.static.parts.dropout is not None:
            q_index, k_index = self.indices(r, c)
            parts = self.parts(r, c)
            self.add_sum(r, c, jnp.sum(p_SR, axis=0, keepdims=True))
            p_SR *= parts.origin.factors(parts.dropout, self.b, self.h, q_index, k_index)
        tile.p[c] = p_SR.astype(self.refs["v"].dtype)

    def add_sum(self, r: int, c: int, total_1R):
        """Adds the sum of the probabilities of a chunk, before dropout."""
        tile, at = self.tiles[r], self.queries(r)
        tile.l = total_1R if tile.l is None else tile.l + total_1R
        if c == self.work[r][-1]:
            if tile.alpha is not None:
                old = self.before()[1] if self.is_first else self.refs["l"][:, at]
                tile.l += tile.alpha * old
            if not self.is_last:
                self.refs["l"][:, at] = tile.l

    def values(self, r: int, c: int):
        """Stage 4: `v^T @ p^T`; after its last chunk the tile is done."""
        tile, at = self.tiles[r], self.queries(r)
        o_CR = scores_lib.dot(
            self.refs["v_t"][:, self.keys(self.starts[r, c])], tile.p.pop(c), ((1,), (0,))
        )
        if self.static.parts.dropout is None:  # the sum is the product with the rows of ones
            width = self.refs["o"].shape[-1]
            self.add_sum(r, c, o_CR[width : width + 1])
            o_CR = o_CR[:width]
        tile.o = o_CR if tile.o is None else tile.o + o_CR
        if c == self.work[r][-1]:
            if not self.is_first:
                tile.o += tile.alpha * self.refs["o_t"][:, at]
            if self.is_last:
                self.finish(r, tile.m, tile.l, tile.o)
            else:
                self.refs["o_t"][:, at] = tile.o

    def finish(self, r: int, m_1R, l_1R, o_CR):
        refs, at = self.refs, self.queries(r)
        # A query that saw nothing but masked keys has EMPTY for a maximum, or its sink.
        inverse = jnp.where(l_1R == 0, 0.0, 1.0 / l_1R)
        refs["o"][0, 0, at, :] = (o_CR * inverse).T.astype(refs["o"].dtype)
        lse_1R = jnp.where(
            l_1R == 0, scores_lib.EMPTY, (m_1R + jnp.log2(l_1R)) * (1 / scores_lib.LOG2E)
        )
        refs["lse"][0, 0, :, at] = lse_1R

    def idle(self, r: int):
        """A tile that sees no key in this visit: what a first or a last visit owes it all the same."""
        refs, at = self.refs, self.queries(r)
        if self.is_first:
            row = (1, self.blocks.tile)
            stats = [jnp.full(row, x, jnp.float32) for x in self.before()]
            stats.append(jnp.zeros((refs["o_t"].shape[0], self.blocks.tile), jnp.float32))
        else:
            stats = [refs[name][:, at] for name in ("m", "l", "o_t")]
        if self.is_last:
            self.finish(r, *stats)
        elif self.is_first:
            refs["m"][:, at], refs["l"][:, at], refs["o_t"][:, at] = stats
            self.query(r)

    def emit(self):
        """Interleaves the stages: scores `lead` units ahead of the softmax, `p @ v` `lag` behind."""
        for r in self.order:
            if not self.work[r]:
                self.idle(r)
        units = [(self.slot[r], c, r) for r in self.order for c in self.work[r]]
        feed = list(units)
        if not self.is_last and not self.is_own:
            feed += [(0, c, None) for c in range(self.blocks.kv // self.blocks.chunk)]
            next_base = self._next_base()

        def is_free(x: int, done: int) -> bool:
            """Whether no unread unit holds the buffer that unit `x` fills."""
            return all(feed[y][:2] != feed[x][:2] for y in range(done, min(x, len(units))))

        def issue(x: int) -> None:
            slot, c, r = feed[x]
            if r is None:
                start = next_base + c * self.blocks.chunk
                self.buffer(slot, c)[...] = self.product(self.order[0], start)
            else:
                self.scores(r, c)

        issued, lead, lag = 0, self.blocks.lead, self.blocks.lag
        for done in range(len(units) + lag):
            if done < len(units):
                _, c, r = units[done]
                needed = max(x for x, unit in enumerate(units) if unit[2] == r) + 1
                while issued < len(feed) and (
                    issued < needed or (issued <= done + lead and is_free(issued, done))
                ):
                    issue(issued)
                    issued += 1
                if c == self.work[r][0]:
                    self.maximum(r)
                self.softmax(r, c)
            if 0 <= done - lag < len(units):
                _, c, r = units[done - lag]
                self.values(r, c)
        for x in range(issued, len(feed)):
            issue(x)


def _inside(static: Static, v_SC, num_rows):
    """Zeros past the end, where anything lies: a zero probability times NaN is NaN."""
    if not static.has_rest:
        return v_SC
    is_inside = lax.broadcasted_iota(jnp.int32, v_SC.shape, 0) < num_rows
    return jnp.where(is_inside, v_SC, jnp.zeros_like(v_SC))


def _transpose_values(static: Static, v_ref, vt_ref, num_keys) -> None:
    """Makes v^T of the keys in VMEM."""
    block = math.gcd(static.visits.span, static.blocks.kv)

    def move(j, _):
        base = pl.multiple_of(j * block, block)
        v_SC = _inside(static, v_ref[pl.ds(base, block), :], num_keys - base)
        vt_ref[: v_ref.shape[-1], pl.ds(base, block)] = v_SC.T

    lax.fori_loop(0, static.visits.span // block, move, None)


def kernel(*refs, static: Static, names: tuple[str, ...]):
    refs = dict(zip(names, refs, strict=True))
    b, h, step = (pl.program_id(x) for x in range(3))
    visits, flags = static.visits, refs["flags"][step]
    is_whole = visits.num_past is None
    origin = 0 if is_whole else refs["first"][step] * static.blocks.chunk
    place = b, h, refs["q_block"][step], origin

    if not static.is_seen_once:
        is_new = flags & forward_visits.NEW_SPAN != 0
        is_new |= (flags & forward_visits.NEW_HEAD != 0) & (lax.rem(h, static.group) == 0)
        left = static.num_keys - origin
        pl.when(is_new)(lambda: _transpose_values(static, refs["v"], refs["v_t"], left))

    @pl.when(step == 0)
    def _():
        width, (rows, keys) = refs["v"].shape[-1], refs["v_t"].shape
        if rows > width:
            refs["v_t"][width:, :] = jnp.ones((rows - width, keys), refs["v_t"].dtype)
        for term in static.terms:
            term.fill(refs["bias_tiles"], refs[term.values_HNX])

    row = b * pl.num_programs(2) + step if visits.is_per_row else step
    ends = [
        [refs[name][row * len(visits.kinds) + n] for name in ("start", "stop")]
        for n in range(len(visits.kinds))
    ]
    shared = [x for kind, x in zip(visits.kinds, ends, strict=True) if not kind.is_own]
    if not is_whole:

        @pl.when((flags & forward_visits.CONTINUES != 0) & (shared[0][0] < shared[-1][1]))
        def _():
            kind = visits.kinds[0]._replace(is_first=False)
            _Visit(static, kind, refs, shared[0][0], place).begin()

    for kind, (begin, end) in zip(visits.kinds, ends, strict=True):

        def visit(n, kind=kind):
            _Visit(static, kind, refs, n, place).emit()

        if kind.is_first or kind.is_last:  # at most one of these in a block of queries
            pl.when(end > begin)(functools.partial(visit, begin))
        else:
            lax.fori_loop(begin, end, lambda n, _, visit=visit: visit(n), None)
