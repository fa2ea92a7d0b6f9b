"""The backward kernel for TPUs: gradients of queries, keys and values, five products a tile.

The maths is that of FlashAttention-2 (Dao 2023, algorithm 2). How the work lies, and why:

- The grid walks macro blocks of some thousand queries by some thousand keys; loops inside walk lists of
  tiles. A step of the grid costs hundreds of cycles of bookkeeping and a tile only some thousands, so
  tiles are not steps. A turn of a loop takes several, so that the end of one overlaps the next.
- Scores are transposed, [keys, queries]: logsumexp and delta of a query are rows, which broadcast for
  nothing, and `p^T @ do`, `ds^T @ q` need no transposition.
- Gradients of keys and values collect in VMEM over the queries of all G heads of a group; those of the
  queries collect over the whole sequence, [C, T] in float32, and leave block by block as they are
  completed: no buffer of partial gradients in HBM. As [C, T], `k^T @ ds` streams only C rows past `ds`.
- Heads narrower than the lanes come and go as [C, T], the layout that XLA itself prefers for them, and
  their gradients are computed as `q^T @ ds`, `do^T @ p`, which stream C rows and not 128.
- Where the queries' gradients do not fit in VMEM, the kernel runs twice: for keys, then for queries.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import backward_visits
from llm_jax.kernels.flash_attention import forward
from llm_jax.kernels.flash_attention import scores as scores_lib

_LOG2E = 1.4426950408889634
_NT = ((1,), (1,))
_NN = ((1,), (0,))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel knows when it is compiled.

    Attributes:
      is_c_first: arrays are [C, T].
      has_dq, has_dkv: which gradients this run makes.
    """

    blocks: backward_visits.Blocks
    parts: scores_lib.Parts
    operands: tuple[scores_lib.Operand, ...]
    num_queries: int
    num_keys: int
    group: int
    is_c_first: bool
    has_dq: bool
    has_dkv: bool

    @property
    def is_ragged(self) -> bool:
        return bool(self.num_queries % self.blocks.macro_q or self.num_keys % self.blocks.macro_k)

    @property
    def query_factor(self) -> float:
        """Folded into the queries, exactly as in the forward kernel."""
        return self.parts.scale * (1.0 if self.parts.changes_scores else _LOG2E)

    @property
    def pieces(self) -> tuple[int, int]:
        """Masked tiles in a macro block: the unit in which [C, T] arrays are cut."""
        blocks = self.blocks
        return blocks.macro_q // blocks.masked_q, blocks.macro_k // blocks.masked_k


def _rows(start, unit: int, size: int):
    return pl.ds(pl.multiple_of(start * unit, unit), size)


def _wide(ref, start, count: int):
    """Returns `count` neighbouring [rows, unit] pieces side by side."""
    if count == 1:
        return ref[start]
    return jnp.concatenate([ref[start + n] for n in range(count)], axis=1)


def _zero_past(x, axis: int, limit):
    """Past the end lies anything, NaN too, and 0 * NaN is NaN: it is set to 0 on loading."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, axis) < limit, x, jnp.zeros_like(x))


def _tile(plan: Plan, refs, tile, is_masked: bool, place, dq_at) -> None:
    """One tile: two products, the elementwise part, three products into the accumulators."""
    b, head, origin_q, origin_k = place
    blocks = plan.blocks
    size_q = blocks.masked_q if is_masked else blocks.open_q
    size_k = blocks.masked_k if is_masked else blocks.open_k
    num_q, num_k = size_q // blocks.masked_q, size_k // blocks.masked_k
    i, j = (tile & 0xFFFF) * num_q, (tile >> 16) * num_k  # in pieces
    at_k = _rows(j, blocks.masked_k, size_k)
    q_start, k_start = origin_q + i * blocks.masked_q, origin_k + j * blocks.masked_k
    k, v = refs["k"][at_k, :], refs["v"][at_k, :]
    lse_1T, delta_1T = _wide(refs["lse"], i, num_q), _wide(refs["delta"], i, num_q)
    if plan.is_c_first:
        q, do, dims = _wide(refs["q_t"], i, num_q), _wide(refs["do_t"], i, num_q), _NN
    else:
        at_q = _rows(i, blocks.masked_q, size_q)
        q, do, dims = refs["q_scaled"][at_q, :], refs["do"][at_q, :], _NT
        if is_masked and plan.is_ragged:
            k, v = (_zero_past(x, 0, plan.num_keys - k_start) for x in (k, v))
            do = _zero_past(do, 0, plan.num_queries - q_start)
    s_ST, dp_ST = forward.dot(k, q, dims), forward.dot(v, do, dims)

    def piece(operand):
        ref = refs[operand.name]
        if operand.dims == "BT":
            return _wide(ref, i, num_q)
        if operand.dims == "BS":
            return forward.column(_wide(ref, j, num_k))
        return ref[{"B": b, "H": head, "": 0}[operand.dims]]

    q_index = q_start + lax.broadcasted_iota(jnp.int32, s_ST.shape, 1)
    k_index = k_start + lax.broadcasted_iota(jnp.int32, s_ST.shape, 0)
    parts = scores_lib.rebuilt(plan.parts, list(plan.operands), piece)
    t, slope = parts.slots(q_index), None
    if parts.changes_scores:
        s_ST, slope = parts.changed(s_ST, t, k_index)
        s_ST *= _LOG2E
    p_ST = jnp.exp2(s_ST - lse_1T)
    if is_masked:  # probabilities, not scores: a query that sees no key has no logsumexp to trust
        is_allowed = parts.mask.allowed(t, k_index)
        if plan.is_ragged:
            is_allowed &= (q_index < plan.num_queries) & (k_index < plan.num_keys)
        p_ST = jnp.where(is_allowed, p_ST, 0.0)
    dropped_ST = p_ST
    if parts.dropout is not None:
        factors_ST = parts.dropout.factors(
            b + parts.row_offset, head + parts.head_offset, q_index, k_index
        )
        dropped_ST, dp_ST = p_ST * factors_ST, dp_ST * factors_ST
    ds_ST = p_ST * (dp_ST - delta_1T)
    if slope is not None:
        ds_ST *= slope
    dropped_ST, ds_ST = dropped_ST.astype(q.dtype), ds_ST.astype(q.dtype)
    if plan.has_dkv:
        _add_dkv(plan, refs, dropped_ST, ds_ST, q, do, j, num_k, at_k)
    if plan.has_dq:
        k_CS = _wide(refs["k_t"], j, num_k)
        for n in range(num_q):
            of_piece = ds_ST[:, n * blocks.masked_q : (n + 1) * blocks.masked_q]
            refs["dq_sum"][dq_at + i + n] += forward.dot(k_CS, of_piece, _NN)


def _add_dkv(plan: Plan, refs, p_ST, ds_ST, q, do, j, num_k: int, at_k) -> None:
    if not plan.is_c_first:
        refs["dv_sum"][at_k, :] += forward.dot(p_ST, do, _NN)
        refs["dk_sum"][at_k, :] += forward.dot(ds_ST, q, _NN)
        return
    for n in range(num_k):
        of_piece = slice(n * plan.blocks.masked_k, (n + 1) * plan.blocks.masked_k)
        refs["dv_sum"][j + n] += forward.dot(do, p_ST[of_piece], _NT)
        refs["dk_sum"][j + n] += forward.dot(q, ds_ST[of_piece], _NT)


def _load(plan: Plan, refs, flags, g, place, dq_at) -> None:
    """What a macro block needs once: accumulators cleared, queries scaled, transposed copies, delta."""
    _, _, origin_q, origin_k = place
    blocks, (num_q, num_k) = plan.blocks, plan.pieces
    left_q, left_k = plan.num_queries - origin_q, plan.num_keys - origin_k
    is_first_k = (flags & backward_visits.FIRST_K != 0) & (g == 0)
    is_first_q = flags & backward_visits.FIRST_Q != 0

    def cut(ref, n: int, unit: int, left):
        """Piece n as [unit, C], or as [C, unit] where arrays come so, zero past the end."""
        at = slice(n * unit, (n + 1) * unit)
        x, axis = (ref[:, at], 1) if plan.is_c_first else (ref[at, :], 0)
        return _zero_past(x, axis, left - n * unit) if plan.is_ragged else x

    def scaled(x):
        return (x.astype(jnp.float32) * plan.query_factor).astype(x.dtype)

    if plan.has_dkv:

        @pl.when(is_first_k)
        def _():
            refs["dk_sum"][...] = jnp.zeros_like(refs["dk_sum"])
            refs["dv_sum"][...] = jnp.zeros_like(refs["dv_sum"])

    if plan.has_dq:

        @pl.when(is_first_q)
        def _():
            zeros = jnp.zeros((num_q, *refs["dq_sum"].shape[1:]), jnp.float32)
            refs["dq_sum"][pl.ds(dq_at, num_q)] = zeros

    # Keys change with every visit where queries are the outer loop, else with the block of keys.
    @pl.when(is_first_k if plan.has_dkv else g == 0)
    def _():
        for n in range(num_k):
            at = slice(n * blocks.masked_k, (n + 1) * blocks.masked_k)
            k = cut(refs["k_in"], n, blocks.masked_k, left_k)
            if plan.has_dq:
                refs["k_t"][n] = k if plan.is_c_first else k.T
            if plan.is_c_first:
                v = cut(refs["v_in"], n, blocks.masked_k, left_k)
                refs["k"][at, :], refs["v"][at, :] = k.T, v.T

    for n in range(num_q):
        q = scaled(cut(refs["q_in"], n, blocks.masked_q, left_q))
        if plan.is_c_first:
            refs["q_t"][n] = q
            refs["do_t"][n] = cut(refs["do_in"], n, blocks.masked_q, left_q)
        else:
            refs["q_scaled"][n * blocks.masked_q : (n + 1) * blocks.masked_q, :] = q


def _store(plan: Plan, refs, flags, g, dq_at) -> None:
    """Gradients leave as they are complete; factors that all elements share are applied here, once."""
    blocks, (num_q, num_k) = plan.blocks, plan.pieces
    # Keys met queries that were scaled already.
    scale, k_scale = plan.parts.scale, plan.parts.scale / plan.query_factor

    def put(ref, n: int, unit: int, x_CN):
        at = slice(n * unit, (n + 1) * unit)
        if plan.is_c_first:
            ref[:, at] = x_CN.astype(ref.dtype)
        else:
            ref[at, :] = x_CN.T.astype(ref.dtype)

    if plan.has_dq:

        @pl.when(flags & backward_visits.LAST_Q != 0)
        def _():
            for n in range(num_q):
                put(refs["dq"], n, blocks.masked_q, refs["dq_sum"][dq_at + n] * scale)

    if plan.has_dkv:

        @pl.when((flags & backward_visits.LAST_K != 0) & (g == plan.group - 1))
        def _():
            if plan.is_c_first:
                for n in range(num_k):
                    put(refs["dk"], n, blocks.masked_k, refs["dk_sum"][n] * k_scale)
                    put(refs["dv"], n, blocks.masked_k, refs["dv_sum"][n])
            else:
                refs["dk"][...] = (refs["dk_sum"][...] * k_scale).astype(refs["dk"].dtype)
                refs["dv"][...] = refs["dv_sum"][...].astype(refs["dv"].dtype)


def _kernel(*refs, plan: Plan, names: tuple[str, ...], row_visits: int):
    refs = dict(zip(names, refs, strict=True))
    b, k_head, visit, g = (pl.program_id(n) for n in range(4))
    at = visit + b * row_visits
    column = {name: refs[name][at] for name in _COLUMNS}
    blocks, head = plan.blocks, k_head * plan.group + g
    num_pieces = plan.pieces[0]
    num_macro = -(-plan.num_queries // blocks.macro_q) if plan.has_dkv else 1
    dq_at = (g * num_macro + (column["q_block"] if plan.has_dkv else 0)) * num_pieces
    place = (b, head, column["q_block"] * blocks.macro_q, column["k_block"] * blocks.macro_k)
    if not plan.is_c_first:
        refs |= {"k": refs["k_in"], "v": refs["v_in"], "do": refs["do_in"]}
    _load(plan, refs, column["flags"], g, place, dq_at)

    def turn(is_masked, count, first, n, _):
        for m in range(count):
            tile = refs["tiles"][first + n * count + m]
            _tile(plan, refs, tile, is_masked, place, dq_at)

    def walk(is_masked, count, first, turns):
        lax.fori_loop(0, turns, functools.partial(turn, is_masked, count, first), None)

    walk(False, blocks.open_unroll, column["open_start"], column["open_turns"])
    unroll, turns = blocks.masked_unroll, column["masked_turns"]
    walk(True, unroll, column["masked_start"], turns)
    if unroll > 1:
        walk(True, 1, column["masked_start"] + turns * unroll, column["masked_rest"])
    _store(plan, refs, column["flags"], g, dq_at)


_COLUMNS = (
    "q_block",
    "k_block",
    "flags",
    "dq_block",
    "open_start",
    "open_turns",
    "masked_start",
    "masked_turns",
    "masked_rest",
)


def _specs(plan: Plan, visits: backward_visits.Visits, C: int, Cv: int) -> dict[str, pl.BlockSpec]:
    """Returns the block specs by name; their index maps read the tables."""
    blocks, group = plan.blocks, plan.group
    index = {name: n for n, name in enumerate(_COLUMNS)}

    def value(tables, name, b, x):
        return tables[index[name]][x + b * visits.num_visits if visits.is_per_row else x]

    def shape(rows, width):
        return (None, None, width, rows) if plan.is_c_first else (None, None, rows, width)

    def at(block):
        return (0, block) if plan.is_c_first else (block, 0)

    def of_query(b, h, x, g, *tables):
        return (b, h * group + g, *at(value(tables, "q_block", b, x)))

    def of_key(b, h, x, g, *tables):
        return (b, h, *at(value(tables, "k_block", b, x)))

    def of_statistic(b, h, x, g, *tables):
        return (b, h * group + g, value(tables, "q_block", b, x), 0, 0)

    def of_dq(b, h, x, g, *tables):
        # A block keeps its place in VMEM until the index moves on: it waits at the head that writes
        # first, or, when all are written, stays at the last.
        flags = value(tables, "flags", b, x)
        waiting = jnp.where(flags & backward_visits.ALL_Q_DONE != 0, group - 1, 0)
        head = jnp.where(flags & backward_visits.LAST_Q != 0, g, waiting) if group > 1 else 0
        return (b, h * group + head, *at(value(tables, "dq_block", b, x)))

    (num_q, num_k), wide_q, wide_k = plan.pieces, (1, blocks.masked_q), (1, blocks.masked_k)
    statistic = pl.BlockSpec((None, None, num_q, *wide_q), of_statistic)
    q, do = (pl.BlockSpec(shape(blocks.macro_q, width), of_query) for width in (C, Cv))
    k, v = (pl.BlockSpec(shape(blocks.macro_k, width), of_key) for width in (C, Cv))
    specs = {"q_in": q, "do_in": do, "k_in": k, "v_in": v, "lse": statistic, "delta": statistic}
    specs |= {"dq": pl.BlockSpec(shape(blocks.macro_q, C), of_dq), "dk": k, "dv": v}
    for operand in plan.operands:
        name, dims = operand.name, operand.dims
        if dims not in ("BT", "BS"):
            specs[name] = pl.BlockSpec(memory_space=pltpu.SMEM)
            continue
        number, row, column = (
            (num_q, wide_q, "q_block") if dims == "BT" else (num_k, wide_k, "k_block")
        )
        specs[name] = pl.BlockSpec(
            (None, number, *row),
            lambda b, h, x, g, *tables, column=column: (b, value(tables, column, b, x), 0, 0),
        )
    return specs


def _scratch(plan: Plan, dtype: Any, C: int, Cv: int) -> dict[str, Any]:
    blocks, (num_q, num_k) = plan.blocks, plan.pieces
    num_macro = -(-plan.num_queries // blocks.macro_q) if plan.has_dkv else 1
    slots = plan.group * num_q * num_macro
    found = {}
    if plan.has_dq:
        found["dq_sum"] = (slots, C, blocks.masked_q), jnp.float32
        found["k_t"] = (num_k, C, blocks.masked_k), dtype
    if plan.has_dkv:
        for name, width in (("dk_sum", C), ("dv_sum", Cv)):
            rows = (num_k, width, blocks.masked_k) if plan.is_c_first else (blocks.macro_k, width)
            found[name] = rows, jnp.float32
    if plan.is_c_first:
        found |= {"k": ((blocks.macro_k, C), dtype), "v": ((blocks.macro_k, Cv), dtype)}
        found["q_t"] = (num_q, C, blocks.masked_q), dtype
        found["do_t"] = (num_q, Cv, blocks.masked_q), dtype
    else:
        found["q_scaled"] = (blocks.macro_q, C), dtype
    return {name: pltpu.VMEM(*shape) for name, shape in found.items()}


def run(
    plan: Plan,
    visits: backward_visits.Visits,
    arrays: dict[str, jax.Array],
    outs: dict[str, jax.ShapeDtypeStruct],
    interpret: bool,
) -> dict[str, jax.Array]:
    """Runs the kernel on one device; arrays and results by name, [C, T] where `plan` says so."""
    c_axis = -2 if plan.is_c_first else -1
    C, Cv = arrays["k_in"].shape[c_axis], arrays["v_in"].shape[c_axis]
    B, K = arrays["k_in"].shape[:2]
    specs, scratch = _specs(plan, visits, C, Cv), _scratch(plan, arrays["k_in"].dtype, C, Cv)
    tables = (*_COLUMNS, "tiles")
    # As if half were masked: 2 * C FLOPs for each pair and product.
    num_products = 2 + plan.has_dq + 2 * plan.has_dkv
    num_pairs = B * K * plan.group * plan.num_queries * plan.num_keys // 2
    moved = sum(x.size * x.dtype.itemsize for x in (*arrays.values(), *outs.values()))
    found = pl.pallas_call(
        functools.partial(
            _kernel,
            plan=plan,
            names=(*tables, *arrays, *outs, *scratch),
            row_visits=visits.num_visits if visits.is_per_row else 0,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(B, K, visits.num_visits, plan.group),
            in_specs=[specs[name] for name in arrays],
            out_specs=[specs[name] for name in outs],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=list(outs.values()),
        interpret=interpret,
        name="flash_attention_backward",
        cost_estimate=pl.CostEstimate(
            flops=2 * num_products * num_pairs * max(C, Cv),
            transcendentals=num_pairs,
            bytes_accessed=moved,
        ),
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=plan.blocks.vmem_bytes,
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        ),
    )(*(visits.columns[name] for name in _COLUMNS), visits.tiles, *arrays.values())
    return dict(zip(outs, found, strict=True))


def _fits_at_once(
    blocks: backward_visits.Blocks, T: int, group: int, widths: int, size: int
) -> bool:
    """Whether the queries' gradients of a group fit in VMEM beside all else that the kernel holds."""
    rows = blocks.macro_q + blocks.macro_k
    windows, copies = 4 * size * rows * widths, size * rows * widths + 4 * blocks.macro_k * widths
    tiles = 6 * 4 * blocks.open_q * blocks.open_k
    sums = 4 * group * -(-T // blocks.macro_q) * blocks.macro_q * widths // 2
    return sums + windows + copies + tiles <= blocks.vmem_bytes


def _in_pieces(x: jax.Array, piece: int, macro: int) -> jax.Array:
    """[..., N] as [..., pieces, 1, piece] of whole macro blocks, zeros past the end."""
    spare = -x.shape[-1] % macro
    x = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, spare)))
    return x.reshape(*x.shape[:-1], -1, 1, piece)


def attention(
    q_BHTC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    dy_BHTC: jax.Array,
    lse_BHT: jax.Array,
    delta_BHT: jax.Array,
    *,
    parts: scores_lib.Parts,
    blocks: backward_visits.Blocks,
    q_offset: jax.Array | int = 0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of queries, keys and values, in their shapes and dtypes.

    Args:
      q_BHTC, k_BKSC, v_BKSC: heads before lengths; H is a multiple of K.
      dy_BHTC: gradient of the result.
      lse_BHT: float32, from the forward kernel.
      delta_BHT: float32, sum of `dy * y` over the width.
      parts: as in the forward kernel.
      blocks: fitted to T and S.
      q_offset: the same slot as in `parts`.
      interpret: run on any platform, slowly.
    """
    H, T, C = q_BHTC.shape[1:]
    K, S, Cv = v_BKSC.shape[1:]
    is_c_first = max(C, Cv) < 128

    def turned(x):
        return jnp.swapaxes(x, 2, 3) if is_c_first else x

    given = scores_lib.operands(parts, H)
    arrays = {"q_in": q_BHTC, "k_in": k_BKSC, "v_in": v_BKSC, "do_in": dy_BHTC}
    arrays = {name: turned(x) for name, x in arrays.items()}
    outs = {
        name: jax.ShapeDtypeStruct(arrays[source].shape, arrays[source].dtype)
        for name, source in (("dq", "q_in"), ("dk", "k_in"), ("dv", "v_in"))
    }
    for name, x_BHT in (("lse", lse_BHT * _LOG2E), ("delta", delta_BHT)):
        arrays[name] = _in_pieces(x_BHT, blocks.masked_q, blocks.macro_q)
    for operand in given:
        sizes = {
            "BT": (blocks.masked_q, blocks.macro_q),
            "BS": (blocks.masked_k, blocks.macro_k),
        }
        array = jnp.asarray(operand.array)
        is_vector = operand.dims in sizes
        arrays[operand.name] = (
            _in_pieces(array, *sizes[operand.dims]) if is_vector else array.reshape(-1)
        )
    bare = tuple(dataclasses.replace(operand, array=None) for operand in given)
    shell = scores_lib.rebuilt(parts, given, lambda operand: operand.name)
    plan = Plan(blocks, shell, bare, T, S, H // K, is_c_first, True, True)
    runs = [(plan, list(outs))]
    if not _fits_at_once(blocks, T, H // K, C + Cv, q_BHTC.dtype.itemsize):
        runs = [
            (dataclasses.replace(plan, has_dq=False), ["dk", "dv"]),
            (dataclasses.replace(plan, has_dkv=False), ["dq"]),
        ]
    found = {}
    for part, names in runs:
        visits = backward_visits.make_visits(
            parts.mask, T, S, blocks, q_offset, is_q_outer=not part.has_dkv
        )
        found |= run(part, visits, arrays, {name: outs[name] for name in names}, interpret)
    dq, dk, dv = (turned(found[name]) for name in outs)
    return dq, dk, dv
