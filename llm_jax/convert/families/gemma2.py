"""Gemma 2 (Gemma Team 2024): soft-caps, norms on both sides of a branch, every other layer local."""

from llm_jax import config as config_lib
from llm_jax.convert import layers
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert.families import activations
from llm_jax.convert.families import llama

_STACK, _THEIRS = llama.STACK, llama.THEIRS

NORM_ROWS = (
    table.row(f"{_STACK}/attention_norm/scale_D", f"{_THEIRS}.input_layernorm.weight"),
    table.row(
        f"{_STACK}/attention_output_norm/scale_D", f"{_THEIRS}.post_attention_layernorm.weight"
    ),
    table.row(f"{_STACK}/mlp_norm/scale_D", f"{_THEIRS}.pre_feedforward_layernorm.weight"),
    table.row(f"{_STACK}/mlp_output_norm/scale_D", f"{_THEIRS}.post_feedforward_layernorm.weight"),
)
# The sizes of the smallest model are what theirs means where a file leaves them out.
SIZES = {
    "num_layers": 26,
    "embed_dim": 2304,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 256,
    "mlp_dim": 9216,
    "tie_embeddings": True,
}
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh"} | activations.NAMES


def _read_scale(theirs: settings.Json, names: settings.Names) -> settings.Ours:
    del names
    return {"attention_scale": theirs.get("query_pre_attn_scalar", 256) ** -0.5}


def _write_scale(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
    del original
    scale = model.attention_scale
    scalar = model.head_width if scale is None else scale**-2
    # Those that were written are whole numbers, which the root does not keep.
    is_whole = abs(scalar - round(scalar)) < 1e-6 * scalar
    return {"query_pre_attn_scalar": round(scalar) if is_whole else scalar}


COMMON = (
    settings.Fixed({"norm_placement": "sandwich", "norm_offset": True, "scale_embeddings": True}),
    settings.Custom(("query_pre_attn_scalar",), _read_scale, _write_scale),
    settings.Choice("hidden_activation", "activation", ACTIVATIONS, "gelu_pytorch_tanh"),
    settings.Only("attention_bias", (False,), False),
    settings.Only("use_bidirectional_attention", (False, None), None),
    settings.Unread(("hidden_act",)),  # Gemma's first files; `hidden_activation` is what counts
)

FAMILY = table.Family(
    model_type="gemma2",
    base="model.",
    settings=(
        *llama.sizes(**SIZES, max_length=8192, vocab_size=256000),
        *COMMON,
        settings.Same("attn_logit_softcapping", "attention_softcap", 50.0),
        settings.Same("final_logit_softcapping", "logit_softcap", 30.0),
        layers.rope(),
        layers.window("sliding_window", 4096, lambda theirs: "LG"),
        llama.heads("Gemma2"),
    ),
    rows=(*llama.EMBEDDING_ROWS, *NORM_ROWS, *llama.ATTENTION_ROWS, *llama.MLP_ROWS),
    aliases=llama.ALIASES,
    constants=llama.CONSTANTS,
)
