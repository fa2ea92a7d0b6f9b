"""Mixtral (Jiang et al. 2024): Mistral with experts in each layer, of which a token has the best two."""

from llm_jax.convert import layers
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert.families import activations
from llm_jax.convert.families import experts
from llm_jax.convert.families import llama

_KEYS = {
    "num_experts": ("num_local_experts", 8),
    "experts_per_token": ("num_experts_per_tok", 2),
}

FAMILY = table.Family(
    model_type="mixtral",
    base="model.",
    settings=(
        *llama.sizes(num_kv_heads=8, mlp_dim=14336, max_length=131072, norm_epsilon=1e-5),
        experts.setting(_KEYS, {"router": "softmax", "normalise_weights": True}),
        layers.rope(1e6),
        layers.window("sliding_window", None, lambda theirs: "L", is_fixed=True),
        settings.Choice("hidden_act", "activation", activations.NAMES, "silu"),
        experts.UNREAD,
        llama.heads("Mixtral"),
    ),
    rows=(
        *llama.EMBEDDING_ROWS,
        *experts.rows(
            (*llama.PRE_NORM_ROWS, *llama.ATTENTION_ROWS), "block_sparse_moe", "w1", "w3", "w2"
        ),
    ),
    aliases=llama.ALIASES,
    constants=llama.CONSTANTS,
)
