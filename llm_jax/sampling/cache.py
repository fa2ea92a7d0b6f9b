"""The memory of a generation: keys and values by slot, and where each row begins."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.kernels import few_rows
from llm_jax.kernels import placement
from llm_jax.kernels.decode_attention import caches
from llm_jax.kernels.decode_attention import op as decode_op
from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import masks
from llm_jax.models import stack

_BIASES = {"alibi": biases.Alibi, "relative": biases.Relative}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """What a decoder reads of the encoder: the same for every token, so it is computed once.

    Attributes:
      cache: keys and values of the encoder's final states, of each layer of the decoder.
      lengths_B: int32, the encoder's tokens of each row, which fill its first slots.
    """

    cache: stack.Cache
    lengths_B: jax.Array


def make_cache(
    config: config_lib.ModelConfig,
    rules: sharding.AxisRules,
    batch_size: int,
    num_slots: int,
    *,
    is_of_encoder: bool = False,
) -> stack.Cache:
    """Returns an empty cache of at least `num_slots` slots for each layer of a decoder.

    It is of the compute dtype. Its layout is what the devices of the mesh that is set read best, see
    `decode_op.make_cache`; with latent attention it holds latents, and what keys have beside them.

    Args:
      config, rules: of the model.
      batch_size, num_slots: rows, and tokens that each has room for.
      is_of_encoder: for the keys of an encoder's tokens, whose distance nothing goes by.
    """
    row_axes, head_axes = rules.act("BK")
    if config.kv_latent_dim is not None:
        Z, width = config.kv_latent_dim, config.kv_latent_dim + config.rope_head_width
        sizes = (batch_size, num_slots, width, Z, config.dtype, row_axes)
        return [caches.make_values_in_keys(*sizes) for _ in range(config.decoder_layers)]
    how = {
        "num_slots": num_slots,
        "width": config.head_width,
        "dtype": config.dtype,
        "row_axes": row_axes,
        "head_axes": head_axes,
        "bias": None if is_of_encoder else _BIASES.get(config.positions),
        "implementation": config.attention,
    }
    return [
        decode_op.make_cache(batch_size, config.kv_heads, **how)
        for _ in range(config.decoder_layers)
    ]


def prompt_mask(starts_B: jax.Array, length: int) -> masks.Mask:
    """Returns which of the first `length` slots are of a row's text, as a mask among them.

    Prompts of unequal length end at the same slot: row b's text fills slots from `starts_B[b]` on,
    and what lies before is padding, which nothing attends to.
    """
    segments_BS = text_numbers(starts_B, length, 0)
    return masks.Segments(segments_BS, segments_BS)


def text_numbers(starts_B: jax.Array, num_tokens: int, slot: jax.Array | int) -> jax.Array:
    """Returns 1 for tokens of a row's text at slots from `slot` on, 0 for padding, int32 [B, T]."""
    slots_T = slot + jnp.arange(num_tokens)
    return (slots_T[None, :] >= starts_B[:, None]).astype(jnp.int32)


def positions(starts_B: jax.Array, num_tokens: int, slot: jax.Array | int) -> jax.Array:
    """Returns the positions [B, T] in their rows' texts of tokens at slots from `slot` on."""
    slots_T = slot + jnp.arange(num_tokens)
    return jnp.maximum(slots_T[None, :] - starts_B[:, None], 0)


# --- beams: several rows of one prompt --------------------------------------------------------------


def repeated(x: Any, num_beams: int) -> Any:
    """Returns arrays, [B, ...], with each row as many times: [B * Q, ...]."""

    def repeat(array):
        shape = (array.shape[0], num_beams, *array.shape[1:])
        return joined(jnp.broadcast_to(array[:, None], shape))

    return jax.tree.map(repeat, x)


def joined(by_row: jax.Array) -> jax.Array:
    """Returns [B, Q, ...] as [B * Q, ...], a row's beams where the row was."""
    row_axes, _, *others = jax.typeof(by_row).sharding.spec
    shape = (-1, *by_row.shape[2:])
    return jnp.reshape(by_row, shape, out_sharding=_spec(row_axes, *others))


def by_row(rows: jax.Array, num_rows: int) -> jax.Array:
    """Returns [B * Q, ...] as [B, Q, ...]."""
    row_axes, *others = jax.typeof(rows).sharding.spec
    shape = (num_rows, -1, *rows.shape[1:])
    return jnp.reshape(rows, shape, out_sharding=_spec(row_axes, None, *others))


def _spec(*axes) -> jax.sharding.PartitionSpec | None:
    # Without axes no mesh need be set. They are named as a dimension of 1 would lose its own.
    return jax.sharding.PartitionSpec(*axes) if any(axes) else None


def block_size() -> int:
    """Returns how many slots `reordered` moves at a time, of which a cache must have a multiple."""
    return 32 if placement.device_kind() == "cpu" else 128  # a TPU cuts its lanes well there alone


def reordered(
    cache: stack.Cache, sources_BQ: jax.Array, first: jax.Array, end: jax.Array
) -> stack.Cache:
    """Returns the cache with other beams' keys and values in the slots of [first, end).

    Whole blocks of slots are moved, in place, and no others are looked at: what lies before `first` should
    be the same in all beams of a row, and what lies from `end` on is not of interest.

    Args:
      cache: of B * Q rows, a multiple of `block_size` slots.
      sources_BQ: int32, which of its row's beams each becomes.
      first, end: int32 scalars.
    """
    size = block_size()
    num_blocks = -(-end // size)

    def move(block: jax.Array, cache: stack.Cache) -> stack.Cache:
        def moved(path, array):
            # Arrays are named by their dimensions: one of them is slots.
            axis = path[-1].name.rpartition("_")[2].index("S")
            own = jax.lax.dynamic_slice_in_dim(array, block * size, size, axis)
            return jax.lax.dynamic_update_slice_in_dim(
                array, taken(own, sources_BQ), block * size, axis
            )

        return jax.tree_util.tree_map_with_path(moved, cache)

    return jax.lax.fori_loop(first // size, num_blocks, move, cache)


def reads_beams(cache: stack.Cache) -> bool:
    """Returns whether attention can read a cache `OfBeams`, of which nothing need be moved."""
    return all(
        isinstance(own, caches.SlotsLast) and few_rows.are_fast(own.k_BKCS.dtype) for own in cache
    )


def own_origins(sources_BQ: jax.Array, num_slots: int) -> jax.Array:
    """Returns the origins of beams that hold all of their slots themselves, [B, Q, S]."""
    own_BQ = jnp.zeros_like(sources_BQ) + jnp.arange(sources_BQ.shape[1])
    return jnp.broadcast_to(own_BQ[..., None], (*own_BQ.shape, num_slots))


def followed(origins_BQS: jax.Array, sources_BQ: jax.Array, slot: jax.Array) -> jax.Array:
    """Returns the origins of beams that continue others and write `slot` themselves."""
    own_BQS = own_origins(sources_BQ, origins_BQS.shape[2])
    is_new_S = jnp.arange(origins_BQS.shape[2]) == slot
    return jnp.where(is_new_S, own_BQS, of_row(origins_BQS, sources_BQ))


def taken(rows: jax.Array, sources_BQ: jax.Array) -> jax.Array:
    """Returns rows [B * Q, ...] of which beam q of row b is what its beam `sources_BQ[b, q]` was."""
    return joined(of_row(by_row(rows, len(sources_BQ)), sources_BQ))


def of_row(values: jax.Array, index: jax.Array) -> jax.Array:
    """Returns `values[b, index[b, i]]` of each row b: [B, I, ...] of [B, J, ...] and [B, I]."""
    return jax.vmap(lambda row, i: row[i])(values, index)
