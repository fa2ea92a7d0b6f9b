"""The two kernels of cross-entropy for the tokens of one device: statistics, and gradients.

Both hold logits transposed, [ids, tokens]: what belongs to a token lies along lanes. A block of the
vocabulary is scored in tiles through two buffers in VMEM, so that the next tile's product runs
beside this one's exponentials.
"""

import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

_MIB = 1 << 20
VMEM_LIMIT = 100 * _MIB  # of what v5e and v6e have
_EMPTY = -1e30  # a logit of an id that does not exist


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What a step of the grid holds; multiples of 128 for a TPU.

    Attributes:
      tokens: whose states, and whose gradients, stay in VMEM while the vocabulary passes by.
      ids: of the vocabulary.
      tile: ids scored at a time; divides `ids`.
    """

    tokens: int = 1024
    ids: int = 1024
    tile: int = 256

    def __post_init__(self):
        if self.ids % self.tile:
            raise ValueError(f"tile = {self.tile} does not divide ids = {self.ids}")


def fit(num_tokens: int, num_ids: int, width: int, dtype) -> Blocks:
    """Returns the blocks for a device's tokens and ids: as large as VMEM lets them be.

    Ids that divide the vocabulary are preferred: others leave a block part of which must be masked.

    Raises:
      ValueError: states too wide for VMEM.
    """
    # Equal blocks of 1,024 tokens at most, of which less than 128 tokens each are padding.
    num_blocks = -(-num_tokens // 1024)
    tokens = -(-num_tokens // (128 * num_blocks)) * 128
    largest = min(1024, -(-num_ids // 128) * 128)
    while tokens >= 128:
        sizes = [ids for ids in range(128, largest + 1, 128)]
        sizes = [ids for ids in sizes if _vmem_bytes(tokens, ids, width, dtype) <= VMEM_LIMIT]
        whole = [ids for ids in sizes if num_ids % ids == 0 and 2 * ids >= sizes[-1]]
        if sizes:
            ids = (whole or sizes)[-1]
            return Blocks(tokens, ids, 256 if ids % 256 == 0 else 128)
        tokens = tokens // 2 // 128 * 128
    raise ValueError(f"cross-entropy 'pallas' cannot hold states of width {width}; use 'chunked'")


def _vmem_bytes(tokens: int, ids: int, width: int, dtype) -> int:
    """Returns what the gradients' kernel needs, twice what is pipelined, and room to spill."""
    size, width = jnp.dtype(dtype).itemsize, -(-width // 128) * 128
    states = tokens * width * (4 * size + 4)
    head = ids * width * (2 * size + 16)
    logits = tokens * (ids * size + 2 * 256 * 4)
    return states + head + logits + 8 * _MIB


@dataclasses.dataclass(frozen=True)
class Static:
    """What both kernels know beside their arrays; `num_ids` are real, the rest of a block is not."""

    blocks: Blocks
    num_ids: int
    softcap: float | None

    def tiles(self) -> int:
        return self.blocks.ids // self.blocks.tile

    def score(self, x_ref, head_ref, buffer_ref, index: int) -> None:
        """Puts the products of a tile of the block into its buffer."""
        buffer_ref[index % 2] = jax.lax.dot_general(
            head_ref[pl.ds(index * self.blocks.tile, self.blocks.tile), :],
            x_ref[...],
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    def logits(self, buffer_ref, block: jax.Array, index: int) -> tuple[jax.Array, jax.Array]:
        """Returns the logits [tile, tokens] of a tile of a block of ids, and the ids."""
        logits_VN = buffer_ref[index % 2]
        if self.softcap is not None:
            logits_VN = self.softcap * jnp.tanh(logits_VN / self.softcap)
        first = block * self.blocks.ids + index * self.blocks.tile
        ids_VN = first + jax.lax.broadcasted_iota(jnp.int32, logits_VN.shape, 0)
        if self.num_ids % self.blocks.ids:
            logits_VN = jnp.where(ids_VN < self.num_ids, logits_VN, _EMPTY)
        return logits_VN, ids_VN


def _statistics_kernel(
    x_ref, head_ref, targets_ref, max_ref, sum_ref, target_ref, buffer_ref, *, static: Static
):
    """The outputs stay in VMEM while the vocabulary passes by, and hold its statistics so far."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, _EMPTY)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        target_ref[...] = jnp.zeros_like(target_ref)

    static.score(x_ref, head_ref, buffer_ref, 0)
    max_1N, sum_1N, target_1N = max_ref[...], sum_ref[...], target_ref[...]
    for index in range(static.tiles()):
        if index + 1 < static.tiles():
            static.score(x_ref, head_ref, buffer_ref, index + 1)
        logits_VN, ids_VN = static.logits(buffer_ref, pl.program_id(1), index)
        new_1N = jnp.maximum(max_1N, jnp.max(logits_VN, axis=0, keepdims=True))
        exps_1N = jnp.sum(jnp.exp(logits_VN - new_1N), axis=0, keepdims=True)
        sum_1N = sum_1N * jnp.exp(max_1N - new_1N) + exps_1N
        max_1N = new_1N
        is_target_VN = ids_VN == targets_ref[...]
        target_1N += jnp.sum(jnp.where(is_target_VN, logits_VN, 0.0), axis=0, keepdims=True)
    max_ref[...], sum_ref[...], target_ref[...] = max_1N, sum_1N, target_1N


def _gradients_kernel(
    x_ref,
    head_ref,
    targets_ref,
    log_z_ref,
    weights_ref,
    scales_ref,
    *refs,
    static: Static,
):
    """`sum_ref` gathers the states' gradient; the head's is added to what other tokens gave."""
    *others_ref, dx_ref, dhead_ref, sum_ref, buffer_ref, slopes_ref = refs

    @pl.when(pl.program_id(0) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    static.score(x_ref, head_ref, buffer_ref, 0)
    for index in range(static.tiles()):
        if index + 1 < static.tiles():
            static.score(x_ref, head_ref, buffer_ref, index + 1)
        logits_VN, ids_VN = static.logits(buffer_ref, pl.program_id(0), index)
        slopes_VN = scales_ref[...] * jnp.exp(logits_VN - log_z_ref[...])
        # The difference is taken before rounding: a target near certainty loses nothing.
        slopes_VN -= jnp.where(ids_VN == targets_ref[...], weights_ref[...], 0.0)
        if static.softcap is not None:
            capped_VN = logits_VN / static.softcap
            slopes_VN *= 1.0 - jnp.square(jnp.clip(capped_VN, -1.0, 1.0))
        tile = pl.ds(index * static.blocks.tile, static.blocks.tile)
        slopes_ref[tile, :] = slopes_VN.astype(slopes_ref.dtype)
        dhead_VD = jnp.dot(slopes_ref[tile, :], x_ref[...], preferred_element_type=jnp.float32)
        for other_ref in others_ref:
            dhead_VD += other_ref[tile, :]
        dhead_ref[tile, :] = dhead_VD
    sum_ref[...] += jax.lax.dot_general(
        slopes_ref[...],
        head_ref[...],
        (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )

    @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
    def _():
        dx_ref[...] = sum_ref[...].astype(dx_ref.dtype)


def _how(name: str, grid: tuple[int, ...], products: int, blocks: Blocks, moved: int, width: int):
    num_logits = grid[0] * blocks.tokens * blocks.ids * (grid[1] if len(grid) > 1 else 1)
    return {
        "grid": grid,
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * len(grid), vmem_limit_bytes=VMEM_LIMIT
        ),
        "cost_estimate": pl.CostEstimate(
            flops=2 * products * num_logits * width,
            transcendentals=num_logits,
            bytes_accessed=moved,
        ),
        "name": name,
    }


def statistics(
    x_ND: jax.Array, head_VD: jax.Array, targets_N: jax.Array, *, static: Static, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns each token's largest logit, the sum of exponentials below it, its target's logit.

    Tokens and ids must be whole blocks; `static.num_ids` of the ids are real. Float32 [N] each; the
    target's logit is 0 for a target that is no id.
    """
    (N, D), V, blocks = x_ND.shape, head_VD.shape[0], static.blocks
    steps = N // blocks.tokens
    moved = (x_ND.size + head_VD.size * steps) * x_ND.dtype.itemsize
    row = pl.BlockSpec((1, blocks.tokens), lambda i, j: (0, i))
    results = pl.pallas_call(
        functools.partial(_statistics_kernel, static=static),
        in_specs=[
            pl.BlockSpec((blocks.tokens, D), lambda i, j: (i, 0)),
            pl.BlockSpec((blocks.ids, D), lambda i, j: (j, 0)),
            row,
        ],
        out_specs=[row] * 3,
        out_shape=[jax.ShapeDtypeStruct((1, N), jnp.float32)] * 3,
        scratch_shapes=[pltpu.VMEM((2, blocks.tile, blocks.tokens), jnp.float32)],
        interpret=interpret,
        **_how("cross_entropy_statistics", (steps, V // blocks.ids), 1, blocks, moved, D),
    )(x_ND, head_VD, targets_N[None])
    return tuple(result_1N[0] for result_1N in results)


def gradients(
    x_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    log_z_N: jax.Array,
    weights_N: jax.Array,
    scales_N: jax.Array,
    *,
    static: Static,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of states, in their dtype, and of the head, in float32.

    The slope of a logit is `scale * exp(logit - log_z)`, less `weight` at the target. Tokens and ids
    must be whole blocks; `static.num_ids` of the ids are real.
    """
    # One call for each block of tokens: a block of the head's gradient is read and written once in
    # a call, so that no step of a pipeline reads what another has yet to write.
    blocks = static.blocks
    arrays = (x_ND, targets_N, log_z_N, weights_N, scales_N)
    cut = tuple(array.reshape(-1, blocks.tokens, *array.shape[1:]) for array in arrays)

    def run(tokens, *dhead_VD):
        x_ND, *rows = tokens
        call = _block_gradients(static, head_VD, x_ND.dtype, bool(dhead_VD), interpret)
        return call(x_ND, head_VD, *(row_N[None] for row_N in rows), *dhead_VD)

    def step(dhead_VD, tokens):
        dx_ND, dhead_VD = run(tokens, dhead_VD)
        return dhead_VD, dx_ND

    # The first block has nothing to add to, which saves writing and reading zeros.
    first_ND, dhead_VD = run(tuple(array[0] for array in cut))
    dhead_VD, rest = jax.lax.scan(step, dhead_VD, tuple(array[1:] for array in cut))
    return jnp.concatenate([first_ND, rest.reshape(-1, x_ND.shape[1])]), dhead_VD


def _block_gradients(static: Static, head_VD: jax.Array, dtype, adds: bool, interpret: bool):
    """Returns the kernel of a block of tokens.

    One that `adds` overwrites its last argument, the head's gradient so far, by the new one.
    """
    (V, D), blocks = head_VD.shape, static.blocks
    states = pl.BlockSpec((blocks.tokens, D), lambda j: (0, 0))
    head = pl.BlockSpec((blocks.ids, D), lambda j: (j, 0))
    row = pl.BlockSpec((1, blocks.tokens), lambda j: (0, 0))
    size = jnp.dtype(dtype).itemsize
    moved = 2 * blocks.tokens * D * size + V * D * (size + 4 + 4 * adds)
    buffers = [
        ((blocks.tokens, D), jnp.float32),
        ((2, blocks.tile, blocks.tokens), jnp.float32),
        ((blocks.ids, blocks.tokens), dtype),
    ]
    return pl.pallas_call(
        functools.partial(_gradients_kernel, static=static),
        in_specs=[states, head, row, row, row, row] + [head] * adds,
        out_specs=[states, head],
        out_shape=[
            jax.ShapeDtypeStruct((blocks.tokens, D), dtype),
            jax.ShapeDtypeStruct((V, D), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM(*buffer) for buffer in buffers],
        input_output_aliases={6: 1} if adds else {},
        interpret=interpret,
        **_how("cross_entropy_gradients", (V // blocks.ids,), 3, blocks, moved, D),
    )
