"""OLMo 2 (OLMo Team 2025): norms of what a branch gives, and of whole queries and keys."""

from llm_jax.convert import layers
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert.families import activations
from llm_jax.convert.families import llama

_STACK, _THEIRS = llama.STACK, llama.THEIRS

FAMILY = table.Family(
    model_type="olmo2",
    base="model.",
    settings=(
        *llama.sizes(vocab_size=50304, norm_epsilon=1e-5),
        settings.Fixed({"norm_placement": "output", "use_qk_norm": True, "qk_norm": "projection"}),
        settings.Only("attention_bias", (False,), False),
        layers.rope(),
        settings.Choice("hidden_act", "activation", activations.NAMES, "silu"),
        llama.heads("Olmo2"),
    ),
    rows=(
        *llama.EMBEDDING_ROWS,
        *llama.ATTENTION_ROWS,
        table.row(
            f"{_STACK}/attention/q_norm/scale_KGC", f"{_THEIRS}.self_attn.q_norm.weight", "(KGC)"
        ),
        table.row(
            f"{_STACK}/attention/k_norm/scale_KC", f"{_THEIRS}.self_attn.k_norm.weight", "(KC)"
        ),
        table.row(
            f"{_STACK}/attention_output_norm/scale_D", f"{_THEIRS}.post_attention_layernorm.weight"
        ),
        *llama.MLP_ROWS,
        table.row(
            f"{_STACK}/mlp_output_norm/scale_D", f"{_THEIRS}.post_feedforward_layernorm.weight"
        ),
    ),
    aliases=llama.ALIASES,
    constants=llama.CONSTANTS,
)
