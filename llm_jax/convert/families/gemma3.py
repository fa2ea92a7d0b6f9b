"""Gemma 3's language model (Kamath et al. 2025): local layers with a rotary base of their own, QK-norm."""

from llm_jax.convert import layers
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert.families import gemma2
from llm_jax.convert.families import llama


def _kinds(theirs: settings.Json) -> str:
    return "L" * (theirs.get("sliding_window_pattern", 6) - 1) + "G"


FAMILY = table.Family(
    model_type="gemma3_text",
    base="model.",
    settings=(
        *llama.sizes(**gemma2.SIZES, max_length=131072, vocab_size=262208),
        *gemma2.COMMON,
        settings.Fixed({"use_qk_norm": True, "qk_norm": "head"}),
        settings.Unread(("attn_logit_softcapping",)),  # transformers does not cap scores, either
        settings.Same("final_logit_softcapping", "logit_softcap", None),
        layers.rope_by_kind("rope_theta", "rope_local_base_freq", 1e6, 1e4),
        layers.window("sliding_window", 4096, _kinds, ("sliding_window_pattern",)),
        settings.Unread(("_sliding_window_pattern",)),
        llama.heads("Gemma3"),
    ),
    rows=(
        *llama.EMBEDDING_ROWS,
        *gemma2.NORM_ROWS,
        *llama.ATTENTION_ROWS,
        *llama.HEAD_NORM_ROWS,
        *llama.MLP_ROWS,
    ),
    aliases=llama.ALIASES,
    constants=llama.CONSTANTS,
)
