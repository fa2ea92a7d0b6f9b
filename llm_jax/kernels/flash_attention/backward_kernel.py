"""The body of the backward kernel; `backward` says how the work lies."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import backward_bias
from llm_jax.kernels.flash_attention import backward_visits
from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import diagonals
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import scores as scores_lib

_NT = ((1,), (1,))
_NN = ((1,), (0,))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel knows when it is compiled.

    Attributes:
      is_c_first: arrays are [C, T].
      is_open_flat: the bias of an open tile is flat but for its corners.
      has_dq, has_dkv, has_dbias: which gradients this run makes.
      own: of a run for the gradient of a full array alone, which of B, K, G the array has. The grid
        walks those, the visits, and then the others, over which the gradient is summed.
    """

    blocks: backward_visits.Blocks
    parts: scores_lib.Parts
    operands: tuple[scores_lib.Operand, ...]
    num_queries: int
    num_keys: int
    group: int
    is_c_first: bool
    is_open_flat: bool
    has_dq: bool = True
    has_dkv: bool = True
    has_dbias: bool = False
    own: tuple[bool, bool, bool] | None = None

    @property
    def terms(self) -> tuple[diagonals.Diagonals, ...]:
        """Of a bias by distance, those for open and for masked tiles."""
        return self.parts.bias if isinstance(self.parts.bias, tuple) else ()

    def place(self, ids: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        """Returns row, key head, visit and head of the group by the place in the grid."""
        if self.own is None:
            return tuple(ids)
        visit = ids[3]
        # Of two ids for the same dimension one is always 0.
        b, k_head, g = (ids[n] + ids[n + 4] for n in range(3))
        return b, k_head, visit, g

    @property
    def is_ragged(self) -> bool:
        return bool(self.num_queries % self.blocks.macro_q or self.num_keys % self.blocks.macro_k)

    @property
    def pieces(self) -> tuple[int, int]:
        """Masked tiles in a macro block: the unit in which [C, T] arrays are cut."""
        blocks = self.blocks
        return blocks.macro_q // blocks.masked_q, blocks.macro_k // blocks.masked_k

    def bias_of(self, is_masked: bool, parts, refs, q_start, k_start, place, shape):
        """Returns the bias of a tile; `parts.bias` is that of open and of masked ones, or of both.

        Args:
          place: pieces of queries and keys before it in the macro block.
        """
        if isinstance(parts.bias, biases.Full):
            units = self.blocks.masked_q, self.blocks.masked_k
            return backward_bias.Array(refs, self.parts.bias.bias_BKGTS, *place, units, shape)
        index = len(parts.bias) - 1 if is_masked else 0
        given = refs, index, parts.bias[index], q_start, k_start
        if self.is_open_flat and not is_masked:
            return backward_bias.Corners(*given, shape)
        return backward_bias.WholeTile(*given)


class Masking(NamedTuple):
    """Whether a tile is masked, and by which mask if not by that of the attention."""

    is_masked: bool
    mask: masks.Mask | None = None


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


def _tile(plan: Plan, refs, tile, masking: Masking, place, dq_at) -> None:
    """One tile: two products, the elementwise part, three products into the accumulators."""
    b, head, origin_q, origin_k = place
    blocks, is_masked = plan.blocks, masking.is_masked
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
    s_ST, dp_ST = scores_lib.dot(k, q, dims), scores_lib.dot(v, do, dims)

    def piece(operand):
        ref = refs[operand.name]
        if operand.dims == "BT":
            return _wide(ref, i, num_q)
        if operand.dims == "BS":
            return scores_lib.column(_wide(ref, j, num_k), size_q)
        if operand.dims in ("HNX", "BKGTS"):
            return ref
        return ref[{"B": b, "H": head, "": 0}[operand.dims]]

    q_index = q_start + lax.broadcasted_iota(jnp.int32, s_ST.shape, 1)
    k_index = k_start + lax.broadcasted_iota(jnp.int32, s_ST.shape, 0)
    parts = scores_lib.rebuilt(plan.parts, list(plan.operands), piece)
    s_ST, slope = parts.capped(s_ST)
    if parts.bias is not None:
        bias = plan.bias_of(is_masked, parts, refs, q_start, k_start, (i, j), s_ST.shape)
        s_ST, lse_1T = bias.added(s_ST, lse_1T)
    p_ST = jnp.exp2(s_ST - lse_1T)
    if is_masked:  # probabilities, not scores: a query that sees no key has no logsumexp to trust
        t_1T = parts.slots(q_start + lax.broadcasted_iota(jnp.int32, lse_1T.shape, 1))
        is_allowed = (masking.mask or parts.mask).allowed(t_1T, k_index)
        if plan.is_ragged:
            is_allowed &= (q_index < plan.num_queries) & (k_index < plan.num_keys)
        p_ST = jnp.where(is_allowed, p_ST, 0.0)
    dropped_ST = p_ST
    if parts.dropout is not None:
        factors_ST = parts.origin.factors(parts.dropout, b, head, q_index, k_index)
        dropped_ST, dp_ST = p_ST * factors_ST, dp_ST * factors_ST
    ds_ST = p_ST * (dp_ST - delta_1T)
    if plan.has_dbias:
        bias.collect(ds_ST)
    if slope is not None:
        ds_ST *= slope
    dropped_ST, ds_ST = dropped_ST.astype(q.dtype), ds_ST.astype(q.dtype)
    if plan.has_dkv:
        _add_dkv(plan, refs, dropped_ST, ds_ST, q, do, j, num_k, at_k)
    if plan.has_dq:
        k_CS = _wide(refs["k_t"], j, num_k)
        for n in range(num_q):
            of_piece = ds_ST[:, n * blocks.masked_q : (n + 1) * blocks.masked_q]
            refs["dq_sum"][dq_at + i + n] += scores_lib.dot(k_CS, of_piece, _NN)


def _add_dkv(plan: Plan, refs, p_ST, ds_ST, q, do, j, num_k: int, at_k) -> None:
    if not plan.is_c_first:
        refs["dv_sum"][at_k, :] += scores_lib.dot(p_ST, do, _NN)
        refs["dk_sum"][at_k, :] += scores_lib.dot(ds_ST, q, _NN)
        return
    for n in range(num_k):
        of_piece = slice(n * plan.blocks.masked_k, (n + 1) * plan.blocks.masked_k)
        refs["dv_sum"][j + n] += scores_lib.dot(do, p_ST[of_piece], _NT)
        refs["dk_sum"][j + n] += scores_lib.dot(q, ds_ST[of_piece], _NT)


def _load(plan: Plan, refs, flags, g, place, dq_at) -> None:
    """What a macro block needs once: accumulators cleared, queries scaled, transposed copies."""
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
        return (x.astype(jnp.float32) * plan.parts.query_factor).astype(x.dtype)

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
    @pl.when(is_first_k if plan.has_dkv else (g == 0) | (not plan.has_dq))
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
    scale, k_scale = plan.parts.scale, plan.parts.scale / plan.parts.query_factor

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


def kernel(
    *refs,
    plan: Plan,
    names: tuple[str, ...],
    columns: tuple[str, ...],
    part_masks: tuple[masks.Mask | None, ...],
    row_visits: int,
):
    refs = dict(zip(names, refs, strict=True))
    ids = [pl.program_id(n) for n in range(4 if plan.own is None else 7)]
    b, k_head, visit, g = plan.place(ids)
    at = visit + b * row_visits
    column = {name: refs[name][at] for name in columns}
    blocks, head = plan.blocks, k_head * plan.group + g
    num_pieces = plan.pieces[0]
    num_macro = -(-plan.num_queries // blocks.macro_q) if plan.has_dkv else 1
    dq_at = (g * num_macro + (column["q_block"] if plan.has_dkv else 0)) * num_pieces
    place = (b, head, column["q_block"] * blocks.macro_q, column["k_block"] * blocks.macro_k)
    if not plan.is_c_first:
        refs |= {"k": refs["k_in"], "v": refs["v_in"], "do": refs["do_in"]}
    _load(plan, refs, column["flags"], g, place, dq_at)
    if plan.own is not None:
        backward_bias.load_array(refs, sum(ids[4:]) == 0)
    if plan.terms:
        # Heads of a group take turns at every visit; one alone keeps its tiles through all of them.
        is_shared = plan.group > 1
        is_first = visit == 0
        backward_bias.load(plan.terms, refs, is_first | is_shared, is_first & (g == 0))

    def turn(masking, count, first, n, _):
        for m in range(count):
            tile = refs["tiles"][first + n * count + m]
            _tile(plan, refs, tile, masking, place, dq_at)

    def walk(masking, count, first, turns):
        lax.fori_loop(0, turns, functools.partial(turn, masking, count, first), None)

    walk(Masking(False), blocks.open_unroll, column["open_start"], column["open_turns"])
    for n, mask in enumerate(part_masks):
        unroll, turns, first = (
            blocks.masked_unroll,
            column[f"masked_turns_{n}"],
            column[f"masked_start_{n}"],
        )
        walk(Masking(True, mask), unroll, first, turns)
        if unroll > 1:
            walk(Masking(True, mask), 1, first + turns * unroll, column[f"masked_rest_{n}"])
    _store(plan, refs, column["flags"], g, dq_at)
    if plan.own is not None:
        last = sum(pl.num_programs(n) - 1 for n in (4, 5, 6))
        backward_bias.store_array(refs, sum(ids[4:]) == last)
    elif plan.has_dbias:
        is_last = visit == pl.num_programs(2) - 1
        store = functools.partial(backward_bias.store, plan.terms, refs, g)
        pl.when(is_last | is_shared)(store)
