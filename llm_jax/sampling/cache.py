"""The memory of a generation: keys and values by slot, and where each row begins."""

import jax
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.kernels.flash_attention import masks
from llm_jax.models import attention
from llm_jax.models import stack


def make_cache(
    config: config_lib.ModelConfig, rules: sharding.AxisRules, batch_size: int, num_slots: int
) -> stack.Cache:
    """Returns an empty cache, k [B, K, C, S] and v [B, K, S, C] a layer, in the compute dtype."""
    sizes = {"B": batch_size, "K": config.kv_heads, "C": config.head_width, "S": num_slots}

    def zeros(letters: str) -> jax.Array:
        shape = tuple(sizes[letter] for letter in letters)
        return jnp.zeros(shape, config.dtype, out_sharding=rules.act(letters))

    return [attention.LayerCache(zeros("BKCS"), zeros("BKSC")) for _ in range(config.num_layers)]


def row_mask(
    config: config_lib.ModelConfig,
    starts_B: jax.Array,
    num_queries: int,
    num_slots: int,
    slot: jax.Array | int,
) -> tuple[masks.Mask, jax.Array]:
    """Returns the mask and the positions [B, T] of queries at slots from `slot` on.

    Prompts of unequal length end at the same slot: row b's text fills slots from `starts_B[b]` on,
    and what lies before is padding, which nothing attends to.
    """
    slots_T = slot + jnp.arange(num_queries)
    q_segments_BT = (slots_T[None, :] >= starts_B[:, None]).astype(jnp.int32)
    k_segments_BS = (jnp.arange(num_slots)[None, :] >= starts_B[:, None]).astype(jnp.int32)
    mask = attention.causal_mask(config) & masks.Segments(q_segments_BT, k_segments_BS)
    return mask, jnp.maximum(slots_T[None, :] - starts_B[:, None], 0)
