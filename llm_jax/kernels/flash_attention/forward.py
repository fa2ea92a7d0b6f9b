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

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import diagonals
from llm_jax.kernels.flash_attention import forward_kernel
from llm_jax.kernels.flash_attention import forward_visits
from llm_jax.kernels.flash_attention import scores as scores_lib

_MIB = 2**20
# Of the 128 MiB that a v5e or v6e has.
VMEM_LIMIT = 100 * _MIB


def _operand_spec(operand: scores_lib.Operand, q_block: int, keys: int, group: int) -> pl.BlockSpec:
    if operand.dims == "BT":
        return pl.BlockSpec((1, 1, q_block), lambda b, h, i, *_: (b, 0, i))
    if operand.dims == "BS":
        return pl.BlockSpec((1, 1, keys), lambda b, h, i, *_: (b, 0, 0))
    if operand.dims == "HNX":
        return pl.BlockSpec((None, *operand.shape[1:]), lambda b, h, i, *_: (h, 0, 0))
    if operand.dims == "BKGTS":
        has = [size > 1 for size in operand.shape[:3]]

        def of_head(b, h, i, *_):
            place = b, lax.div(h, group), lax.rem(h, group)
            return (*(x if is_own else 0 for x, is_own in zip(place, has)), i, 0)

        return pl.BlockSpec((None, None, None, q_block, keys), of_head)
    return pl.BlockSpec(memory_space=pltpu.SMEM)


def _as_argument(operand: scores_lib.Operand) -> jax.Array:
    """Returns an operand in the shape that a kernel takes: rows as [B, 1, T or S], scalars as [1]."""
    array = operand.array
    if operand.dims in ("HNX", "BKGTS"):
        return array
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
    return specs | {
        operand.name: _operand_spec(operand, blocks.q, keys, group) for operand in given
    }


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
      float32 [B, H, T], `forward_kernel.EMPTY` for a query that sees no key.
    """
    B, H, T, C = q_BHTC.shape
    K, S, Cv = v_BKSC.shape[1:]
    group, keys = H // K, -(-S // blocks.kv) * blocks.kv
    bias = parts.bias
    if isinstance(bias, biases.Alibi | biases.Relative):
        shape = (blocks.chunk, blocks.tile)
        terms = (diagonals.make(bias, parts.mask, shape, q_offset),)
        parts = dataclasses.replace(parts, bias=terms)
    given = scores_lib.operands(parts)
    specs = _specs(blocks, C, Cv, keys, group, given)
    arguments = [q_BHTC, k_BKSC, v_BKSC, *(_as_argument(operand) for operand in given)]
    if sinks_H is not None:
        specs["sinks"] = pl.BlockSpec(memory_space=pltpu.SMEM)
        arguments.append(sinks_H.astype(jnp.float32))
    outs = {
        "o": pl.BlockSpec((1, 1, blocks.q, Cv), lambda b, h, i, *_: (b, h, i, 0)),
        "lse": pl.BlockSpec((1, 1, 1, blocks.q), lambda b, h, i, *_: (b, h, 0, i)),
    }
    scratch = _scratch(blocks, C, Cv, keys, q_BHTC.dtype, parts)
    # The operands' arrays are arguments of the call; the kernel's body must not close over them.
    bare = tuple(dataclasses.replace(operand, array=None) for operand in given)
    shell = scores_lib.rebuilt(parts, given, lambda operand: operand.name)
    static = forward_kernel.Static(blocks, visits, shell, bare, S, group)
    num_pairs = B * H * (T * S if visits.is_per_row else visits.kv.size * blocks.q * blocks.kv)
    moved = sum(x.size * x.dtype.itemsize for x in arguments) + B * H * T * Cv * 2
    o_BHTC, lse_BH1T = pl.pallas_call(
        functools.partial(forward_kernel.kernel, static=static, names=(*specs, *outs, *scratch)),
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
            vmem_limit_bytes=vmem_bytes(C, Cv, keys, blocks, q_BHTC.dtype, bias),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_pairs * (C + Cv), transcendentals=num_pairs, bytes_accessed=moved
        ),
        interpret=interpret,
        name="flash_attention_forward",
    )(visits.start, visits.stop, visits.kv, *arguments)
    return o_BHTC, lse_BH1T[:, :, 0]


def fit(
    blocks: forward_visits.Blocks, C: int, Cv: int, T: int, S: int, dtype, bias: biases.Bias | None
) -> forward_visits.Blocks:
    """Returns blocks for the lengths; of fewer queries where a full array would not fit otherwise."""
    fitted, least = blocks.fit(T), blocks.tile * blocks.slots
    while isinstance(bias, biases.Full) and fitted.q % (2 * least) == 0:
        keys = -(-S // fitted.kv) * fitted.kv
        if vmem_bytes(C, Cv, keys, fitted, dtype, bias) <= VMEM_LIMIT // 2:
            break
        fitted = dataclasses.replace(fitted, q=fitted.q // 2)
    return fitted


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
    resident = 2 * keys * (lanes(C) + lanes(Cv)) * size + keys * Cv * size
    rows = blocks.q * (3 * lanes(C) + 2 * lanes(Cv)) * size + blocks.q * (Cv + 32) * 4
    buffers = blocks.slots * blocks.kv * blocks.tile * 4
    if isinstance(bias, biases.Full):
        buffers += 2 * blocks.q * lanes(keys) * bias.bias_BKGTS.dtype.itemsize
    elif bias is not None:
        buffers += (
            diagonals.most_tiles(bias, blocks.chunk, blocks.tile) * blocks.chunk * blocks.tile * 4
        )
    return resident + rows + buffers + 12 * _MIB
