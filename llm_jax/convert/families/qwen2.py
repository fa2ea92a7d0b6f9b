"""Qwen 2 and 2.5 (Yang et al. 2024): Llama with biases of queries, keys and values."""

from llm_jax import config as config_lib
from llm_jax.convert import layers
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert.families import activations
from llm_jax.convert.families import llama


def _kinds(theirs: settings.Json) -> str:
    """Returns the letters of all layers: a window, if any, begins after the first ones."""
    num_layers, num_global = (
        theirs.get("num_hidden_layers", 32),
        theirs.get("max_window_layers", 28),
    )
    if not theirs.get("use_sliding_window", False):
        return "G"
    return layers.shortest("".join("L" if i >= num_global else "G" for i in range(num_layers)))


def _read_use(theirs: settings.Json, names: settings.Names) -> settings.Ours:
    del names
    return {} if theirs.get("use_sliding_window", False) else {"window": None, "layer_pattern": ""}


def _write_use(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
    del original
    return {"use_sliding_window": model.window is not None}


# The second setting decides whether what the first one says of a window counts.
WINDOW = (
    layers.window("sliding_window", 4096, _kinds, ("max_window_layers", "num_hidden_layers")),
    settings.Custom(("use_sliding_window",), _read_use, _write_use),
)

FAMILY = table.Family(
    model_type="qwen2",
    base="model.",
    settings=(
        *llama.sizes(num_kv_heads=32, mlp_dim=22016, max_length=32768, vocab_size=151936),
        settings.Fixed({"use_qkv_bias": True}),
        layers.rope(),
        *WINDOW,
        settings.Choice("hidden_act", "activation", activations.NAMES, "silu"),
        settings.Unread(("use_mrope",)),
        llama.heads("Qwen2"),
    ),
    rows=(
        *llama.EMBEDDING_ROWS,
        *llama.PRE_NORM_ROWS,
        *llama.ATTENTION_ROWS,
        *llama.QKV_BIAS_ROWS,
        *llama.MLP_ROWS,
    ),
    aliases=llama.ALIASES,
    constants=llama.CONSTANTS,
)
