"""The forward kernel for TPUs: resident keys, transposed scores, visits by table.

After FlashAttention (Dao et al. 2022, algorithm 1) with its online softmax. Three choices make it fast:

1. Scores are computed transposed, `k @ q^T`, [keys, queries]. Statistics of a query then lie along the
   lanes: a maximum over keys is an elementwise maximum of registers, and running maximum, sum and
   rescaling factor are rows. The output is accumulated as `v^T @ p^T`, so the probabilities are what
   the matrix unit holds and the narrow `v^T` streams past: a head narrower than the unit wastes none
   of that product. `v^T` is made once for a key head.
2. All keys and values of a head sit in VMEM (their block does not change with the queries), so a visit
   is a turn of a loop and not a step of the grid.
3. A visit is one basic block in which the order of emission is the software pipeline: scores of later
   tiles are issued before the softmax of this one, `p @ v` trails it, and scores pass through buffers
   of their own (as values, the compiler spills them in an order that takes the overlap away). The
   pipeline runs on across visits: each issues the scores of the next one's first tile.
"""

import dataclasses
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import forward_visits
from llm_jax.kernels.flash_attention import scores as scores_lib

# Of a query that has seen no key: finite, so that differences of maxima stay finite.
EMPTY = -1e30
# Score of a masked pair, so much lower that exp2(MASKED - EMPTY) is 0: such a query sums to 0.
_MASKED = -3e38
_MIB = 2**20
# Of the 128 MiB that a v5e or v6e has.
VMEM_LIMIT = 100 * _MIB


@dataclasses.dataclass(frozen=True)
class _Static:
    """What the kernel knows when it is compiled."""

    blocks: forward_visits.Blocks
    visits: forward_visits.Visits
    parts: scores_lib.Parts
    operands: tuple[scores_lib.Operand, ...]
    num_keys: int
    group: int


class _Tile:
    """The running values of one tile of queries during a visit."""

    def __init__(self):
        self.q = self.m = self.l = self.o = self.alpha = None
        self.p = {}


def dot(a: jax.Array, b: jax.Array, contracting: tuple[tuple[int, ...], tuple[int, ...]]):
    """Returns a product accumulated in float32, exact for float32 operands."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (contracting, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def column(row_1N: jax.Array) -> jax.Array:
    """Returns [1, N] as [N, 1]; eight equal rows are what a register transposes."""
    return jnp.broadcast_to(row_1N, (8, row_1N.shape[1])).T[:, :1]


class _Visit:
    """Emits the visit of key block `kv[n]` by query block `i`; each method one stage of one tile."""

    def __init__(self, static: _Static, kind: forward_visits.Kind, refs, n, place):
        self.static, self.blocks, self.refs, self.n = static, static.blocks, refs, n
        self.b, self.h, self.i = place
        self.pattern, self.is_first, self.is_last = kind
        self.base = self._base(n)
        self.tiles = [_Tile() for _ in self.pattern]
        # Last tile first: it has most work at a causal edge, so the scores that the visit before
        # has issued for it are needed.
        self.order = list(range(len(self.pattern)))[::-1]
        self.slot = {r: x % self.blocks.slots for x, r in enumerate(self.order)}
        self.work = {
            r: [c for c, part in enumerate(self.pattern[r]) if part != forward_visits.SKIP]
            for r in self.order
        }

    def _base(self, n):
        return pl.multiple_of(self.refs["kv"][n] * self.blocks.kv, self.blocks.kv)

    def queries(self, r: int) -> slice:
        return slice(r * self.blocks.tile, (r + 1) * self.blocks.tile)

    def keys(self, c: int, base):
        chunk = self.blocks.chunk
        return pl.ds(pl.multiple_of(base + c * chunk, chunk), chunk)

    def buffer(self, slot: int, c: int):
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

    def product(self, r: int, c: int, base):
        return dot(self.refs["k"][0, 0, self.keys(c, base), :], self.query(r), ((1,), (1,)))

    def scores(self, r: int, c: int):
        """Stage 1: the scores of a chunk into their buffer, and their maximum."""
        tile, is_masked = self.tiles[r], self.pattern[r][c] == forward_visits.PART
        buffer, new = self.buffer(self.slot[r], c), None
        if r == self.order[0] and not self.is_first:
            x_SR = buffer[...]  # issued by the visit before, as they come
        else:
            x_SR = new = self.product(r, c, self.base)
        if is_masked or self.static.parts.changes_scores:
            x_SR = new = self.adjusted(x_SR, r, c, is_masked)
        if new is not None:
            buffer[...] = new
        top = jnp.max(x_SR, axis=0, keepdims=True)
        tile.m = top if tile.m is None else jnp.maximum(tile.m, top)

    def indices(self, r: int, c: int):
        """Returns the places of a chunk's queries and keys in their arrays, int32 [keys, queries]."""
        shape = (self.blocks.chunk, self.blocks.tile)
        k_index = self.base + c * self.blocks.chunk + lax.broadcasted_iota(jnp.int32, shape, 0)
        q_start = self.i * self.blocks.q + r * self.blocks.tile
        return q_start + lax.broadcasted_iota(jnp.int32, shape, 1), k_index

    def parts(self, r: int, c: int) -> scores_lib.Parts:
        """Returns mask, bias and dropout around the pieces of this chunk."""

        def piece(operand):
            ref = self.refs[operand.name]
            if operand.dims == "BT":
                return ref[0, :, self.queries(r)]
            if operand.dims == "BS":
                return column(ref[0, :, self.keys(c, self.base)])
            return ref[{"B": self.b, "H": self.h, "": 0}[operand.dims]]

        return scores_lib.rebuilt(self.static.parts, self.static.operands, piece)

    def adjusted(self, x_SR, r: int, c: int, is_masked: bool):
        """Returns scores, to the base 2, after soft-cap, bias and, in masked parts, the mask."""
        q_index, s = self.indices(r, c)
        parts = self.parts(r, c)
        t = parts.slots(q_index)
        if parts.changes_scores:
            x_SR = parts.changed(x_SR, t, s)[0] * scores_lib.LOG2E
        if not is_masked:
            return x_SR
        is_allowed = parts.mask.allowed(t, s)
        if self.static.num_keys % self.blocks.kv:  # keys past the end hold anything, NaN too
            is_allowed &= s < self.static.num_keys
        return jnp.where(is_allowed, x_SR, _MASKED)

    def before(self):
        """Maximum and sum before the first key: of nothing, or of the sink, a key without a value."""
        if "sinks" not in self.refs:
            return EMPTY, 0.0
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
        tile, at = self.tiles[r], self.queries(r)
        p_SR = jnp.exp2(self.buffer(self.slot[r], c)[...] - tile.m)
        total = jnp.sum(p_SR, axis=0, keepdims=True)
        tile.l = total if tile.l is None else tile.l + total
        if self.static.parts.dropout is not None:
            q_index, k_index = self.indices(r, c)
            parts = self.parts(r, c)
            row, head = self.b + parts.row_offset, self.h + parts.head_offset
            p_SR *= parts.dropout.factors(row, head, q_index, k_index)
        tile.p[c] = p_SR.astype(self.refs["v"].dtype)
        if c == self.work[r][-1]:
            if tile.alpha is not None:
                old = self.before()[1] if self.is_first else self.refs["l"][:, at]
                tile.l += tile.alpha * old
            if not self.is_last:
                self.refs["l"][:, at] = tile.l

    def values(self, r: int, c: int):
        """Stage 4: `v^T @ p^T`; after its last chunk the tile is done."""
        tile, at = self.tiles[r], self.queries(r)
        o_CR = dot(self.refs["v_t"][:, self.keys(c, self.base)], tile.p.pop(c), ((1,), (0,)))
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
        lse_1R = jnp.where(l_1R == 0, EMPTY, (m_1R + jnp.log2(l_1R)) * (1 / scores_lib.LOG2E))
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
        if not self.is_last:
            feed += [(0, c, None) for c in range(self.blocks.kv // self.blocks.chunk)]
            next_base = self._base(self.n + 1)

        def is_free(x: int, done: int) -> bool:
            """Whether no unread unit holds the buffer that unit `x` fills."""
            return all(feed[y][:2] != feed[x][:2] for y in range(done, min(x, len(units))))

        def issue(x: int) -> None:
            slot, c, r = feed[x]
            if r is None:
                self.buffer(slot, c)[...] = self.product(self.order[0], c, next_base)
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


def _transpose_values(v_ref, vt_ref, block: int, num_keys: int) -> None:
    """Makes v^T of a key head, zero past the end: a zero probability times NaN is NaN."""

    def move(base, num_rows):
        v_SC = v_ref[0, 0, pl.ds(base, block), :]
        if num_rows < block:
            is_inside = lax.broadcasted_iota(jnp.int32, v_SC.shape, 0) < num_rows
            v_SC = jnp.where(is_inside, v_SC, jnp.zeros_like(v_SC))
        vt_ref[:, pl.ds(base, block)] = v_SC.T

    num_whole = num_keys // block
    lax.fori_loop(0, num_whole, lambda j, _: move(pl.multiple_of(j * block, block), block), None)
    if num_keys % block:
        move(num_whole * block, num_keys % block)


def _kernel(start, stop, kv, *refs, static: _Static, names: tuple[str, ...]):
    refs = {"kv": kv} | dict(zip(names, refs, strict=True))
    b, h, i = (pl.program_id(x) for x in range(3))
    visits = static.visits

    @pl.when((i == 0) & (lax.rem(h, static.group) == 0))
    def _():
        _transpose_values(refs["v"], refs["v_t"], static.blocks.kv, static.num_keys)

    row = b * pl.num_programs(2) + i if visits.is_per_row else i
    for index, kind in enumerate(visits.kinds):
        begin, end = (table[row * len(visits.kinds) + index] for table in (start, stop))

        def visit(n, kind=kind):
            _Visit(static, kind, refs, n, (b, h, i)).emit()

        if kind.is_first or kind.is_last:  # at most one of these in a block of queries
            pl.when(end > begin)(functools.partial(visit, begin))
        else:
            lax.fori_loop(begin, end, lambda n, _, visit=visit: visit(n), None)


def _operand_spec(operand: scores_lib.Operand, q_block: int, keys: int) -> pl.BlockSpec:
    if operand.dims == "BT":
        return pl.BlockSpec((1, 1, q_block), lambda b, h, i, *_: (b, 0, i))
    if operand.dims == "BS":
        return pl.BlockSpec((1, 1, keys), lambda b, h, i, *_: (b, 0, 0))
    return pl.BlockSpec(memory_space=pltpu.SMEM)


def _as_argument(operand: scores_lib.Operand) -> jax.Array:
    """Returns an operand in the shape that a kernel takes: [B, 1, T or S], [B], [H] or [1]."""
    array = operand.array
    return array[:, None, :] if operand.dims in ("BT", "BS") else array.reshape(-1)


def _specs(blocks, C: int, Cv: int, keys: int, group: int, given) -> dict[str, pl.BlockSpec]:
    """Returns the block specs of the inputs; keys and values stay while the queries change."""

    def of_query(b, h, i, *_):
        return (b, h, i, 0)

    def of_key(b, h, i, *_):
        return (b, lax.div(h, group), 0, 0)

    specs = {
        "q": pl.BlockSpec((1, 1, blocks.q, C), of_query),
        "k": pl.BlockSpec((1, 1, keys, C), of_key),
        "v": pl.BlockSpec((1, 1, keys, Cv), of_key),
    }
    return specs | {operand.name: _operand_spec(operand, blocks.q, keys) for operand in given}


def _scratch(blocks, C: int, Cv: int, keys: int, dtype) -> dict[str, tuple]:
    return {
        "q_scaled": ((blocks.q, C), dtype),
        "v_t": ((Cv, keys), dtype),
        "m": ((1, blocks.q), jnp.float32),
        "l": ((1, blocks.q), jnp.float32),
        "o_t": ((Cv, blocks.q), jnp.float32),
        "scores": ((blocks.slots, blocks.kv, blocks.tile), jnp.float32),
    }


def attention(
    q_BHTC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    *,
    parts: scores_lib.Parts,
    visits: forward_visits.Visits,
    blocks: forward_visits.Blocks,
    sinks_H: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel on one device.

    Args:
      q_BHTC, k_BKSC, v_BKSC: heads before lengths; H is a multiple of K.
      parts: mask, bias, dropout, scale.
      visits: from `forward_visits.make_visits`, with the same mask and blocks.
      blocks: fitted to T.
      sinks_H: float32.
      interpret: run on any platform, slowly.

    Returns:
      [B, H, T, C of the values] in the dtype of the queries, and the logsumexp of the scores,
      float32 [B, H, T], `EMPTY` for a query that sees no key.
    """
    B, H, T, C = q_BHTC.shape
    K, S, Cv = v_BKSC.shape[1:]
    group, keys = H // K, -(-S // blocks.kv) * blocks.kv
    given = scores_lib.operands(parts, H)
    specs = _specs(blocks, C, Cv, keys, group, given)
    arguments = [q_BHTC, k_BKSC, v_BKSC, *(_as_argument(operand) for operand in given)]
    if sinks_H is not None:
        specs["sinks"] = pl.BlockSpec(memory_space=pltpu.SMEM)
        arguments.append(sinks_H.astype(jnp.float32))
    outs = {
        "o": pl.BlockSpec((1, 1, blocks.q, Cv), lambda b, h, i, *_: (b, h, i, 0)),
        "lse": pl.BlockSpec((1, 1, 1, blocks.q), lambda b, h, i, *_: (b, h, 0, i)),
    }
    scratch = _scratch(blocks, C, Cv, keys, q_BHTC.dtype)
    # The operands' arrays are arguments of the call; the kernel's body must not close over them.
    bare = tuple(dataclasses.replace(operand, array=None) for operand in given)
    shell = scores_lib.rebuilt(parts, given, lambda operand: operand.name)
    static = _Static(blocks, visits, shell, bare, S, group)
    num_pairs = B * H * (T * S if visits.is_per_row else visits.kv.size * blocks.q * blocks.kv)
    moved = sum(x.size * x.dtype.itemsize for x in arguments) + B * H * T * Cv * 2
    o_BHTC, lse_BH1T = pl.pallas_call(
        functools.partial(_kernel, static=static, names=(*specs, *outs, *scratch)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, H, -(-T // blocks.q)),
            in_specs=list(specs.values()),
            out_specs=list(outs.values()),
            scratch_shapes=[pltpu.VMEM(*shape) for shape in scratch.values()],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, H, T, Cv), q_BHTC.dtype),
            jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes(C, Cv, keys, blocks, q_BHTC.dtype),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_pairs * (C + Cv), transcendentals=num_pairs, bytes_accessed=moved
        ),
        interpret=interpret,
        name="flash_attention_forward",
    )(visits.start, visits.stop, visits.kv, *arguments)
    return o_BHTC, lse_BH1T[:, :, 0]


def vmem_bytes(C: int, Cv: int, keys: int, blocks: forward_visits.Blocks, dtype) -> int:
    """Returns the VMEM to ask for: all buffers, twice where they are pipelined, and room to spill."""

    def lanes(width: int) -> int:
        return -(-width // 128) * 128

    size = jnp.dtype(dtype).itemsize
    resident = 2 * keys * (lanes(C) + lanes(Cv)) * size + keys * Cv * size
    rows = blocks.q * (3 * lanes(C) + 2 * lanes(Cv)) * size + blocks.q * (Cv + 32) * 4
    buffers = blocks.slots * blocks.kv * blocks.tile * 4
    return resident + rows + buffers + 12 * _MIB
