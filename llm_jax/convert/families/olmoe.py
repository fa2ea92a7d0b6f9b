"""OLMoE (Muennighoff et al. 2024): 64 experts in each layer, whose weights keep their share of the softmax."""

from llm_jax.convert import layers
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert.families import activations
from llm_jax.convert.families import experts
from llm_jax.convert.families import llama

_STACK, _THEIRS = llama.STACK, llama.THEIRS
_KEYS = {
    "num_experts": ("num_experts", 64),
    "experts_per_token": ("num_experts_per_tok", 8),
    "normalise_weights": ("norm_topk_prob", False),
}
# Of whole queries and keys.
_NORM_ROWS = (
    table.row(
        f"{_STACK}/attention/q_norm/scale_KGC", f"{_THEIRS}.self_attn.q_norm.weight", "(KGC)"
    ),
    table.row(f"{_STACK}/attention/k_norm/scale_KC", f"{_THEIRS}.self_attn.k_norm.weight", "(KC)"),
)

FAMILY = table.Family(
    model_type="olmoe",
    base="model.",
    settings=(
        *llama.sizes(
            embed_dim=2048,
            num_layers=16,
            num_heads=16,
            mlp_dim=2048,
            max_length=4096,
            vocab_size=50304,
            norm_epsilon=1e-5,
        ),
        experts.setting(_KEYS, {"router": "softmax"}),
        settings.Fixed({"use_qk_norm": True, "qk_norm": "projection"}),
        settings.Only("attention_bias", (False,), False),
        settings.Only("clip_qkv", (None,), None),
        layers.rope(),
        settings.Choice("hidden_act", "activation", activations.NAMES, "silu"),
        experts.UNREAD,
        llama.heads("Olmoe"),
    ),
    rows=(
        *llama.EMBEDDING_ROWS,
        *experts.rows(
            (*llama.PRE_NORM_ROWS, *llama.ATTENTION_ROWS, *_NORM_ROWS),
            "mlp",
            "gate_proj",
            "up_proj",
            "down_proj",
        ),
    ),
    aliases=llama.ALIASES,
    constants=llama.CONSTANTS,
)
