"""The memory of a generation: keys and values by slot, and where each row begins."""

import jax
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.kernels.decode_attention import op as decode_op
from llm_jax.kernels.flash_attention import masks
from llm_jax.models import stack


def make_cache(
    config: config_lib.ModelConfig, rules: sharding.AxisRules, batch_size: int, num_slots: int
) -> stack.Cache:
    """Returns an empty cache of at least `num_slots` slots a layer, in the compute dtype.

    Its layout is what the devices of the mesh that is set read best, see `decode_op.make_cache`.
    """
    row_axes, head_axes = rules.act("BK")
    how = {
        "num_slots": num_slots,
        "width": config.head_width,
        "dtype": config.dtype,
        "row_axes": row_axes,
        "head_axes": head_axes,
        "implementation": config.attention,
    }
    return [
        decode_op.make_cache(batch_size, config.kv_heads, **how) for _ in range(config.num_layers)
    ]


def prompt_mask(starts_B: jax.Array, length: int) -> masks.Mask:
    """Returns which of the first `length` slots are of a row's text, as a mask among them.

    Prompts of unequal length end at the same slot: row b's text fills slots from `starts_B[b]` on,
    and what lies before is padding, which nothing attends to.
    """
    segments_BS = (jnp.arange(length)[None, :] >= starts_B[:, None]).astype(jnp.int32)
    return masks.Segments(segments_BS, segments_BS)


def positions(starts_B: jax.Array, num_tokens: int, slot: jax.Array | int) -> jax.Array:
    """Returns the positions [B, T] in their rows' texts of tokens at slots from `slot` on."""
    slots_T = slot + jnp.arange(num_tokens)
    return jnp.maximum(slots_T[None, :] - starts_B[:, None], 0)
