"""The forward kernel for TPUs: keys in VMEM, transposed scores, visits by table.

After FlashAttention (Dao et al. 2022, algorithm 1) with its online softmax. Three choices make it fast:

1. Scores are computed transposed, `k @ q^T`, [keys, queries]. Statistics of a query then lie along the
   lanes: a maximum over keys is an elementwise maximum of registers, and running maximum, sum and
   rescaling factor are rows. The output is accumulated as `v^T @ p^T`, so the probabilities are what
   the matrix unit holds and the narrow `v^T` streams past: a head narrower than the unit wastes none
   of that product. `v^T` is made once for a key head.
2. All keys and values of a head sit in VMEM (their block does not change with the queries), so a visit
   is a turn of a loop and not a step of the grid. Where they do not fit, or a mask leaves a band of
   them, a span of keys comes with each step, fetched during the step before; `v^T` is made of each.
3. A visit is one basic block in which the order of emission is the software pipeline: scores of later
   tiles are issued before the softmax of this one, `p @ v` trails it, and scores pass through buffers
   of their own (as values, the compiler spills them in an order that takes the overlap away). The
   pipeline runs on across visits: each issues the scores of the next one's first tile.
"""

from collections.abc import Iterator
import dataclasses
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import diagonals
from llm_jax.kernels.flash_attention import forward_kernel
from llm_jax.kernels.flash_attention import forward_visits
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import scores as scores_lib

_MIB = 2**20
# Of the 128 MiB that a v5e or v6e has.
VMEM_LIMIT = 100 * _MIB


# The tables of the visits, in the order in which the kernel takes them.
_TABLES = ("start", "stop", "kv", "units", "q_block", "first", "flags")
_Q_BLOCK, _FIRST = _TABLES.index("q_block"), _TABLES.index("first")


def _as_argument(operand: scores_lib.Operand) -> jax.Array:
    """Returns an operand in the shape that a kernel takes: rows as [B, 1, T or S], scalars as [1]."""
    array = operand.array
    if operand.dims in ("HNX", "BKGTS"):
        return array
    return array[:, None, :] if operand.dims in ("BT", "BS") else array.reshape(-1)


def _specs(visits, blocks, C: int, Cv: int, group: int, given) -> dict[str, pl.BlockSpec]:
    """Returns the block specs of the inputs; their index maps read the tables."""

    def of_query(b, h, x, *tables):
        return (b, h, tables[_Q_BLOCK][x], 0)

    def origin(x, tables):
        return 0 if visits.num_past is None else tables[_FIRST][x] * blocks.chunk

    def of_key(b, h, x, *tables):
        return (b, lax.div(h, group), origin(x, tables), 0)

    def keys(width):
        """Keys and values that stay while the queries change, or go along with them."""
        if visits.num_past is None:
            return pl.BlockSpec((None, None, visits.span, width), of_key)
        rows = pl.Element(visits.span, (0, visits.num_past))
        return pl.BlockSpec((None, None, rows, pl.Element(width)), of_key)

    def of_operand(operand):
        if operand.dims == "BT":
            return pl.BlockSpec(
                (1, 1, blocks.q), lambda b, h, x, *tables: (b, 0, tables[_Q_BLOCK][x])
            )
        if operand.dims == "HNX":
            return pl.BlockSpec((None, *operand.shape[1:]), lambda b, h, x, *_: (h, 0, 0))
        if operand.dims == "BKGTS":
            return of_array(operand.shape)
        if operand.dims != "BS":
            return pl.BlockSpec(memory_space=pltpu.SMEM)
        shape = (1, 1, visits.span)
        if visits.num_past is not None:
            shape = tuple(
                pl.Element(*size) for size in ((1,), (1,), (visits.span, (0, visits.num_past)))
            )
        return pl.BlockSpec(shape, lambda b, h, x, *tables: (b, 0, origin(x, tables)))

    def of_array(shape):
        """A bias array: rows and heads that share it read the same block."""
        has = [size > 1 for size in shape[:3]]
        rows, columns, step = blocks.q, visits.span, 1
        if visits.num_past is not None:  # elements, and not blocks, are what the index counts
            rows, step = pl.Element(blocks.q, (0, -shape[3] % blocks.q)), blocks.q
            columns = pl.Element(visits.span, (0, visits.num_past))

        def index(b, h, x, *tables):
            place = b, lax.div(h, group), lax.rem(h, group)
            own = (at if is_own else 0 for at, is_own in zip(place, has))
            return (*own, tables[_Q_BLOCK][x] * step, origin(x, tables))

        return pl.BlockSpec((None, None, None, rows, columns), index)

    specs = {
        "q": pl.BlockSpec((1, 1, blocks.q, C), of_query),
        "k": keys(C),
        "v": keys(Cv),
    }
    return specs | {operand.name: of_operand(operand) for operand in given}


def _scratch(blocks, C: int, Cv: int, keys: int, dtype, parts) -> dict[str, tuple]:
    num_ones = 0 if parts.dropout is not None else forward_kernel.ONES
    found = {
        "q_scaled": ((blocks.q, C), dtype),
        "v_t": ((Cv + num_ones, keys), dtype),
        "m": ((1, blocks.q), jnp.float32),
        "l": ((1, blocks.q), jnp.float32),
        "o_t": ((Cv, blocks.q), jnp.float32),
        "scores": ((blocks.slots, blocks.kv, blocks.tile), jnp.float32),
    }
    if isinstance(parts.bias, tuple):
        found["bias_tiles"] = (parts.bias[0].tiles_shape, jnp.float32)
    return found


def attention(
    q_BHTC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    *,
    parts: scores_lib.Parts,
    visits: forward_visits.Visits,
    blocks: forward_visits.Blocks,
    sinks_H: jax.Array | None = None,
    q_offset: jax.Array | int = 0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel on one device.

    Args:
      q_BHTC, k_BKSC, v_BKSC: heads before lengths; H is a multiple of K.
      parts: mask, bias, dropout, scale.
      visits: from `forward_visits.make_visits`, with the same mask and blocks.
      blocks: fitted to T.
      sinks_H: float32.
      q_offset: the same slot as in `parts`.
      interpret: run on any platform, slowly.

    Returns:
      [B, H, T, C of the values] in the dtype of the queries, and the logsumexp of the scores,
      float32 [B, H, T], `scores.EMPTY` for a query that sees no key.
    """
    B, H, T, C = q_BHTC.shape
    K, S, Cv = v_BKSC.shape[1:]
    group, bias = H // K, parts.bias
    if isinstance(bias, biases.Alibi | biases.Relative):
        shape = (blocks.chunk, blocks.tile)
        terms = (diagonals.make(bias, parts.mask, shape, q_offset),)
        parts = dataclasses.replace(parts, bias=terms)
    given = scores_lib.operands(parts)
    specs = _specs(visits, blocks, C, Cv, group, given)
    arguments = [q_BHTC, k_BKSC, v_BKSC, *(_as_argument(operand) for operand in given)]
    if sinks_H is not None:
        specs["sinks"] = pl.BlockSpec(memory_space=pltpu.SMEM)
        arguments.append(sinks_H.astype(jnp.float32))
    scratch = _scratch(blocks, C, Cv, visits.span, q_BHTC.dtype, parts)
    # The operands' arrays are arguments of the call; the kernel's body must not close over them.
    bare = tuple(dataclasses.replace(operand, array=None) for operand in given)
    shell = scores_lib.rebuilt(parts, given, lambda operand: operand.name)
    static = forward_kernel.Static(blocks, visits, shell, bare, S, group)
    limit = vmem_bytes(C, Cv, visits.span, blocks, q_BHTC.dtype, bias)
    return _call(static, specs, scratch, arguments, limit, interpret)


def _call(
    static: forward_kernel.Static,
    specs: dict[str, pl.BlockSpec],
    scratch: dict[str, tuple],
    arguments: list[jax.Array],
    vmem_limit: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel on inputs and scratch by name; returns result and logsumexp."""
    (B, H, T, C), (_, K, S, Cv), dtype = *(x.shape for x in arguments[:3:2]), arguments[0].dtype
    blocks, visits = static.blocks, static.visits
    outs = {
        "o": pl.BlockSpec((1, 1, blocks.q, Cv), specs["q"].index_map),
        "lse": pl.BlockSpec(
            (1, 1, 1, blocks.q), lambda b, h, x, *tables: (b, h, 0, tables[_Q_BLOCK][x])
        ),
    }
    num_pairs = B * H * (T * S if visits.is_per_row else visits.kv.size * blocks.q * blocks.kv)
    moved = sum(x.size * x.dtype.itemsize for x in arguments) + B * H * T * Cv * dtype.itemsize
    o_BHTC, lse_BH1T = pl.pallas_call(
        functools.partial(
            forward_kernel.kernel, static=static, names=(*_TABLES, *specs, *outs, *scratch)
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(_TABLES),
            grid=(B, H, visits.q_block.size),
            in_specs=list(specs.values()),
            out_specs=list(outs.values()),
            scratch_shapes=[pltpu.VMEM(*shape) for shape in scratch.values()],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, H, T, Cv), dtype),
            jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=_semantics(B, K),
            vmem_limit_bytes=vmem_limit,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_pairs * (C + Cv), transcendentals=num_pairs, bytes_accessed=moved
        ),
        interpret=interpret,
        name="flash_attention_forward",
    )(*(getattr(visits, name) for name in _TABLES), *arguments)
    return o_BHTC, lse_BH1T[:, :, 0]


def _semantics(B: int, K: int) -> tuple[str, str, str]:
    """Returns which dimension of the grid two cores of a chip may part.

    Rows, or heads where rows are odd; a group of heads, which shares `v^T`, stays on one core.
    """
    if B % 2 and K % 2 == 0:
        return "arbitrary", "parallel", "arbitrary"
    return "parallel", "arbitrary", "arbitrary"


def fitted(
    blocks: forward_visits.Blocks,
    mask: masks.Mask,
    lengths: tuple[int, int],
    widths: tuple[int, int],
    dtype,
    q_offset: jax.Array | int = 0,
    bias: biases.Bias | None = None,
) -> forward_visits.Blocks | None:
    """Returns the sizes for `lengths` T and S and `widths` of queries and values, None if none fits.

    Keys and values of a head lie in VMEM if they fit, else they come in spans for each block of queries.
    Beside a full array these blocks become smaller.
    """
    whole, band = blocks.fit(lengths[0]), forward_visits.fitted(blocks, mask, *lengths, q_offset)
    spans = () if blocks.span is not None else (16, 8, 4, 2, 1)
    parted = [dataclasses.replace(whole, span=count * whole.kv) for count in spans]
    has_array = isinstance(bias, biases.Full)
    for limit in (VMEM_LIMIT // 2, VMEM_LIMIT) if has_array else (VMEM_LIMIT,):
        for sizes in (band, whole, *parted):
            keys = sizes.span or -(-lengths[1] // sizes.kv) * sizes.kv
            for smaller in _smaller(sizes) if has_array else (sizes,):
                if vmem_bytes(*widths, keys, smaller, dtype, bias) <= limit:
                    return smaller
    return None


def _smaller(blocks: forward_visits.Blocks) -> Iterator[forward_visits.Blocks]:
    """Yields the sizes with fewer and fewer queries."""
    yield blocks
    while blocks.q % (2 * blocks.tile * blocks.slots) == 0:
        blocks = dataclasses.replace(blocks, q=blocks.q // 2)
        yield blocks


def vmem_bytes(
    C: int,
    Cv: int,
    keys: int,
    blocks: forward_visits.Blocks,
    dtype,
    bias: biases.Bias | None = None,
) -> int:
    """Returns the VMEM to ask for: all buffers, twice where they are pipelined, and room to spill."""

    def lanes(width: int) -> int:
        return -(-width // 128) * 128

    size = jnp.dtype(dtype).itemsize
    resident = 2 * keys * (lanes(C) + lanes(Cv)) * size
    resident += keys * (Cv + forward_kernel.ONES) * size
    rows = blocks.q * (3 * lanes(C) + 2 * lanes(Cv)) * size + blocks.q * (Cv + 32) * 4
    buffers = blocks.slots * blocks.kv * blocks.tile * 4
    if isinstance(bias, biases.Full):
        buffers += 2 * blocks.q * lanes(keys) * bias.bias_BKGTS.dtype.itemsize
    elif bias is not None:
        buffers += (
            diagonals.most_tiles(bias, blocks.chunk, blocks.tile) * blocks.chunk * blocks.tile * 4
        )
    return resident + rows + buffers + 12 * _MIB
