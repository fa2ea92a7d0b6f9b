"""Qwen 3 with experts (Yang et al. 2025): many small ones, in all layers or in some."""

from llm_jax.convert import layers
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert.families import activations
from llm_jax.convert.families import experts
from llm_jax.convert.families import llama
from llm_jax.convert.families import qwen2

_KEYS = {
    "num_experts": (("num_experts", "num_local_experts"), 128),  # of transformers 4 and 5
    "experts_per_token": ("num_experts_per_tok", 8),
    "expert_dim": ("moe_intermediate_size", 768),
    "normalise_weights": ("norm_topk_prob", False),
}
_LAYER_ROWS = (*llama.PRE_NORM_ROWS, *llama.ATTENTION_ROWS, *llama.HEAD_NORM_ROWS)

FAMILY = table.Family(
    model_type="qwen3_moe",
    base="model.",
    settings=(
        *llama.sizes(
            embed_dim=2048,
            num_layers=24,
            num_kv_heads=4,
            mlp_dim=6144,
            max_length=32768,
            vocab_size=151936,
        ),
        experts.setting(_KEYS, {"router": "softmax"}, dense_layers=True),
        settings.Fixed({"use_qk_norm": True, "qk_norm": "head"}),
        settings.Only("attention_bias", (False,), False),
        layers.rope(),
        *qwen2.WINDOW,
        settings.Choice("hidden_act", "activation", activations.NAMES, "silu"),
        experts.UNREAD,
        llama.heads("Qwen3Moe"),
    ),
    rows=(
        *llama.EMBEDDING_ROWS,
        *_LAYER_ROWS,
        *llama.MLP_ROWS,
        *experts.rows(_LAYER_ROWS, "mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    aliases=llama.ALIASES,
    constants=llama.CONSTANTS,
)
