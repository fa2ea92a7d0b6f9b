"""Qwen 3 (Yang et al. 2025), dense: Llama with norms of queries and keys."""

from llm_jax.convert import layers
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert.families import activations
from llm_jax.convert.families import llama
from llm_jax.convert.families import qwen2

FAMILY = table.Family(
    model_type="qwen3",
    base="model.",
    settings=(
        *llama.sizes(
            num_kv_heads=32, head_dim=128, mlp_dim=22016, max_length=32768, vocab_size=151936
        ),
        settings.Fixed({"use_qk_norm": True, "qk_norm": "head"}),
        settings.Only("attention_bias", (False,), False),
        layers.rope(),
        *qwen2.WINDOW,
        settings.Choice("hidden_act", "activation", activations.NAMES, "silu"),
        llama.heads("Qwen3"),
    ),
    rows=(
        *llama.EMBEDDING_ROWS,
        *llama.PRE_NORM_ROWS,
        *llama.ATTENTION_ROWS,
        *llama.HEAD_NORM_ROWS,
        *llama.MLP_ROWS,
    ),
    aliases=llama.ALIASES,
    constants=llama.CONSTANTS,
)
