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
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import backward_kernel
from llm_jax.kernels.flash_attention import backward_plan
from llm_jax.kernels.flash_attention import backward_visits
from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import diagonals
from llm_jax.kernels.flash_attention import scores as scores_lib


def _specs(
    plan: backward_kernel.Plan, visits: backward_visits.Visits, C: int, Cv: int
) -> dict[str, pl.BlockSpec]:
    """Returns the block specs by name; their index maps read the tables."""
    blocks, group = plan.blocks, plan.group
    index = {name: n for n, name in enumerate(visits.columns)}

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

    statistic = pl.BlockSpec((None, None, plan.pieces[0], 1, blocks.masked_q), of_statistic)
    q, do = (pl.BlockSpec(shape(blocks.macro_q, width), of_query) for width in (C, Cv))
    k, v = (pl.BlockSpec(shape(blocks.macro_k, width), of_key) for width in (C, Cv))
    specs = {"q_in": q, "do_in": do, "k_in": k, "v_in": v, "lse": statistic, "delta": statistic}
    specs |= {"dq": pl.BlockSpec(shape(blocks.macro_q, C), of_dq), "dk": k, "dv": v}
    for n, term in enumerate(plan.terms):
        sums = (None, None, group, *term.sums_shape)
        specs[f"dbias_{n}"] = pl.BlockSpec(sums, lambda b, h, *_: (b, h, 0, 0, 0, 0))
    for operand in plan.operands:
        specs[operand.name] = _operand_spec(plan, operand, value)
        if operand.dims == "BKGTS":
            specs["dbias"] = specs[operand.name]
    if plan.own is None:
        return specs
    return {name: _on_longer_grid(plan, spec) for name, spec in specs.items()}


def _operand_spec(plan: backward_kernel.Plan, operand: scores_lib.Operand, value) -> pl.BlockSpec:
    """Returns the block spec of an array of mask, bias or dropout; `value` looks up a column."""
    blocks, (num_q, num_k) = plan.blocks, plan.pieces
    if operand.dims == "HNX":
        heads = (None, *operand.shape[1:])
        return pl.BlockSpec(heads, lambda b, h, x, g, *tables: (h * plan.group + g, 0, 0))
    if operand.dims == "BKGTS":
        has = [size > 1 for size in operand.shape[:3]]

        def of_block(b, h, x, g, *tables):
            place = (n if is_own else 0 for n, is_own in zip((b, h, g), has))
            return (*place, *(value(tables, column, b, x) for column in ("q_block", "k_block")))

        return pl.BlockSpec((None, None, None, blocks.macro_q, blocks.macro_k), of_block)
    pieces = {
        "BT": (num_q, (1, blocks.masked_q), "q_block"),
        "BS": (num_k, (1, blocks.masked_k), "k_block"),
    }
    if operand.dims not in pieces:
        return pl.BlockSpec(memory_space=pltpu.SMEM)
    number, row, column = pieces[operand.dims]
    return pl.BlockSpec(
        (None, number, *row), lambda b, h, x, g, *tables: (b, value(tables, column, b, x), 0, 0)
    )


def _on_longer_grid(plan: backward_kernel.Plan, spec: pl.BlockSpec) -> pl.BlockSpec:
    """Returns a spec for the grid of `plan` by one for rows, key heads, visits and heads of a group."""
    if spec.index_map is None:
        return spec

    def index(*ids_and_tables):
        ids, tables = ids_and_tables[:7], ids_and_tables[7:]
        return spec.index_map(*plan.place(ids), *tables)

    return pl.BlockSpec(spec.block_shape, index)


def _scratch(plan: backward_kernel.Plan, dtype: Any, C: int, Cv: int) -> dict[str, Any]:
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
    if plan.own is not None:
        found["bias_sums"] = (num_q, blocks.macro_k, blocks.masked_q), jnp.float32
    for n, term in enumerate(plan.terms):
        found[f"bias_tiles_{n}"] = term.tiles_shape, jnp.float32
        if plan.has_dbias:
            found[f"bias_sums_{n}"] = term.tiles_shape, jnp.float32
    return {name: pltpu.VMEM(*shape) for name, shape in found.items()}


def run(
    plan: backward_kernel.Plan,
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
    tables = (*visits.columns, "tiles")
    # As if half were masked: 2 * C FLOPs for each pair and product.
    num_products = 2 + plan.has_dq + 2 * plan.has_dkv
    grid, num_inner = (B, K, visits.num_visits, plan.group), 2
    if plan.own is not None:
        sizes = B, K, plan.group
        own, others = (
            [size if is_own == side else 1 for size, is_own in zip(sizes, plan.own)]
            for side in (True, False)
        )
        grid, num_inner = (*own, visits.num_visits, *others), 4
    num_pairs = B * K * plan.group * plan.num_queries * plan.num_keys // 2
    moved = sum(x.size * x.dtype.itemsize for x in (*arrays.values(), *outs.values()))
    found = pl.pallas_call(
        functools.partial(
            backward_kernel.kernel,
            plan=plan,
            names=(*tables, *arrays, *outs, *scratch),
            columns=tuple(visits.columns),
            part_masks=visits.part_masks,
            row_visits=visits.num_visits if visits.is_per_row else 0,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=grid,
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
            dimension_semantics=("parallel",) * (len(grid) - num_inner)
            + ("arbitrary",) * num_inner,
        ),
    )(*visits.columns.values(), visits.tiles, *arrays.values())
    return dict(zip(outs, found, strict=True))


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
    visits: tuple[backward_visits.Visits, ...] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, biases.Bias | None]:
    """Returns the gradients of queries, keys and values, in their shapes and dtypes, and of the bias.

    That of slopes is left out, None. That of a full array is made by a run of the kernel of its own,
    which the compiler leaves out where nobody asks for it; of a table it is a by-product.

    Args:
      q_BHTC, k_BKSC, v_BKSC: heads before lengths; H is a multiple of K.
      dy_BHTC: gradient of the result.
      lse_BHT: float32, from the forward kernel.
      delta_BHT: float32, sum of `dy * y` over the width.
      parts: as in the forward kernel.
      blocks: fitted to T and S.
      q_offset: the same slot as in `parts`.
      visits: from `backward_plan.make_visits`, if they are made already.
      interpret: run on any platform, slowly.
    """
    B, H, T, C = q_BHTC.shape
    K, S, Cv = v_BKSC.shape[1:]
    is_c_first = max(C, Cv) < 128

    def turned(x):
        return jnp.swapaxes(x, 2, 3) if is_c_first else x

    bias, sizes = parts.bias, (H // K, C, Cv, q_BHTC.dtype.itemsize)
    if visits is None:
        visits = backward_plan.make_visits(parts, blocks, T, S, sizes, q_offset)
    parts, blocks, flat_from, runs = backward_plan.planned(parts, blocks, T, sizes, q_offset)
    terms = parts.bias if isinstance(parts.bias, tuple) else ()
    given = scores_lib.operands(parts)
    arrays = {"q_in": q_BHTC, "k_in": k_BKSC, "v_in": v_BKSC, "do_in": dy_BHTC}
    arrays = {name: turned(x) for name, x in arrays.items()}
    outs = _outs(arrays, bias, terms, (B, K, H // K))
    for name, x_BHT in (("lse", lse_BHT * scores_lib.LOG2E), ("delta", delta_BHT)):
        arrays[name] = _in_pieces(x_BHT, blocks.masked_q, blocks.macro_q)
    arrays |= {operand.name: _as_argument(operand, blocks) for operand in given}
    bare = tuple(dataclasses.replace(operand, array=None) for operand in given)
    shell = scores_lib.rebuilt(parts, given, lambda operand: operand.name)
    plan = backward_kernel.Plan(
        blocks=blocks,
        parts=shell,
        operands=bare,
        num_queries=T,
        num_keys=S,
        group=H // K,
        is_c_first=is_c_first,
        is_open_flat=flat_from is not None,
    )
    found = {}
    for one, of_run in zip(runs, visits, strict=True):
        part, names = _of_run(one, plan, bias, list(outs))
        found |= run(part, of_run, arrays, {name: outs[name] for name in names}, interpret)
    dbias = _bias_gradient(bias, terms, found, q_offset)
    return *(turned(found[name]) for name in ("dq", "dk", "dv")), dbias


def _outs(
    arrays: dict[str, jax.Array],
    bias: biases.Bias | None,
    terms: tuple[diagonals.Diagonals, ...],
    heads: tuple[int, int, int],
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the results by name; `heads` are B, K and G."""
    outs = {
        name: jax.ShapeDtypeStruct(arrays[source].shape, arrays[source].dtype)
        for name, source in (("dq", "q_in"), ("dk", "k_in"), ("dv", "v_in"))
    }
    if isinstance(bias, biases.Relative):
        for n, term in enumerate(terms):
            outs[f"dbias_{n}"] = jax.ShapeDtypeStruct((*heads, *term.sums_shape), jnp.float32)
    if isinstance(bias, biases.Full):
        outs["dbias"] = jax.ShapeDtypeStruct(bias.bias_BKGTS.shape, bias.bias_BKGTS.dtype)
    return outs


def _bias_gradient(
    bias: biases.Bias | None,
    terms: tuple[diagonals.Diagonals, ...],
    found: dict[str, jax.Array],
    q_offset: jax.Array | int,
) -> biases.Bias | None:
    if isinstance(bias, biases.Relative):
        sums = [jnp.sum(found[f"dbias_{n}"], 0) for n in range(len(terms))]
        return diagonals.gradient(bias, sums, terms, q_offset)
    if isinstance(bias, biases.Full):
        return dataclasses.replace(bias, bias_BKGTS=found["dbias"])
    return None


def _of_run(
    one: backward_plan.Run, plan: backward_kernel.Plan, bias: biases.Bias | None, outs: list[str]
) -> tuple[backward_kernel.Plan, list[str]]:
    """Returns what the kernel knows in one run, and the names of what it makes."""
    if one.is_of_array:
        own = tuple(size > 1 for size in bias.bias_BKGTS.shape[:3])
        of_array = {"has_dq": False, "has_dkv": False, "has_dbias": True, "own": own}
        return dataclasses.replace(plan, **of_array), ["dbias"]
    has_dbias = one.has_dkv and isinstance(bias, biases.Relative)
    plan = dataclasses.replace(plan, has_dq=one.has_dq, has_dkv=one.has_dkv, has_dbias=has_dbias)
    is_made = {"dq": one.has_dq, "dbias": False}
    return plan, [name for name in outs if is_made.get(name, one.has_dkv)]


def _as_argument(operand: scores_lib.Operand, blocks: backward_visits.Blocks) -> jax.Array:
    """Returns an operand in the shape that a kernel takes: vectors in pieces, scalars as [1]."""
    if operand.dims in ("HNX", "BKGTS"):
        return operand.array
    if operand.dims == "BT":
        return _in_pieces(operand.array, blocks.masked_q, blocks.macro_q)
    if operand.dims == "BS":
        return _in_pieces(operand.array, blocks.masked_k, blocks.macro_k)
    return operand.array.reshape(-1)
