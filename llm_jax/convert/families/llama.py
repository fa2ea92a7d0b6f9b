"""Llama 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024) and Mistral (Jiang et al. 2023).

Rotary pairs lie half a head apart in theirs and in ours, so no row is permuted.
"""

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.convert import layers
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert.families import activations

STACK, THEIRS = "stack/layers", "model.layers.{layer}"

# What all decoders that came of Llama have, under the same names.
EMBEDDING_ROWS = (
    table.row("embedding/table_VD", "model.embed_tokens.weight"),
    table.row("final_norm/scale_D", "model.norm.weight"),
    table.row("head_DV", "lm_head.weight", "VD"),
)
ATTENTION_ROWS = (
    table.row(f"{STACK}/attention/q_DKGC", f"{THEIRS}.self_attn.q_proj.weight", "(KGC)D"),
    table.row(f"{STACK}/attention/k_DKC", f"{THEIRS}.self_attn.k_proj.weight", "(KC)D"),
    table.row(f"{STACK}/attention/v_DKC", f"{THEIRS}.self_attn.v_proj.weight", "(KC)D"),
    table.row(f"{STACK}/attention/out_KGCD", f"{THEIRS}.self_attn.o_proj.weight", "D(KGC)"),
)
QKV_BIAS_ROWS = (
    table.row(f"{STACK}/attention/q_bias_KGC", f"{THEIRS}.self_attn.q_proj.bias", "(KGC)"),
    table.row(f"{STACK}/attention/k_bias_KC", f"{THEIRS}.self_attn.k_proj.bias", "(KC)"),
    table.row(f"{STACK}/attention/v_bias_KC", f"{THEIRS}.self_attn.v_proj.bias", "(KC)"),
)
BIAS_ROWS = (
    *QKV_BIAS_ROWS,
    table.row(f"{STACK}/attention/out_bias_D", f"{THEIRS}.self_attn.o_proj.bias"),
    table.row(f"{STACK}/mlp/gate_bias_F", f"{THEIRS}.mlp.gate_proj.bias"),
    table.row(f"{STACK}/mlp/up_bias_F", f"{THEIRS}.mlp.up_proj.bias"),
    table.row(f"{STACK}/mlp/out_bias_D", f"{THEIRS}.mlp.down_proj.bias"),
)
HEAD_NORM_ROWS = (
    table.row(f"{STACK}/attention/q_norm/scale_C", f"{THEIRS}.self_attn.q_norm.weight"),
    table.row(f"{STACK}/attention/k_norm/scale_C", f"{THEIRS}.self_attn.k_norm.weight"),
)
MLP_ROWS = (
    table.row(f"{STACK}/mlp/gate_DF", f"{THEIRS}.mlp.gate_proj.weight", "FD"),
    table.row(f"{STACK}/mlp/up_DF", f"{THEIRS}.mlp.up_proj.weight", "FD"),
    table.row(f"{STACK}/mlp/out_FD", f"{THEIRS}.mlp.down_proj.weight", "DF"),
)
PRE_NORM_ROWS = (
    table.row(f"{STACK}/attention_norm/scale_D", f"{THEIRS}.input_layernorm.weight"),
    table.row(f"{STACK}/mlp_norm/scale_D", f"{THEIRS}.post_attention_layernorm.weight"),
)
ALIASES = {"lm_head.weight": "model.embed_tokens.weight"}
CONSTANTS = (table.Constant(f"{THEIRS}.self_attn.rotary_emb.inv_freq"),)


def sizes(**defaults: int | float | bool | None) -> tuple[settings.Setting, ...]:
    """Returns the settings of sizes, by the names that Llama gave them; `defaults` by our names."""
    keys = {
        "num_layers": ("num_hidden_layers", 32),
        "embed_dim": ("hidden_size", 4096),
        "num_heads": ("num_attention_heads", 32),
        "num_kv_heads": ("num_key_value_heads", None),
        "head_dim": ("head_dim", None),
        "mlp_dim": ("intermediate_size", 11008),
        "max_length": ("max_position_embeddings", 2048),
        "vocab_size": ("vocab_size", 32000),
        "norm_epsilon": ("rms_norm_eps", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", False),
    }
    same = [settings.Same(key, ours, defaults.get(ours, d)) for ours, (key, d) in keys.items()]
    return (*same, settings.Dropout(("attention_dropout",), ("attention_dropout",)))


def heads(name: str) -> settings.Setting:
    """Returns the setting of a decoder's classes, `nameForCausalLM` and the bare `nameModel`."""
    return settings.Heads({f"{name}ForCausalLM": {"head": "lm"}, f"{name}Model": {"head": "none"}})


def _read_biases(theirs: settings.Json, names: settings.Names) -> settings.Ours:
    del names
    attention, mlp = (bool(theirs.get(key, False)) for key in ("attention_bias", "mlp_bias"))
    if attention != mlp:
        raise errors.UserError(
            f"attention_bias = {attention} with mlp_bias = {mlp} (llm_jax has both or neither)"
        )
    return {"use_bias": attention}


def _write_biases(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
    del original
    return {"attention_bias": model.use_bias, "mlp_bias": model.use_bias}


FAMILY = table.Family(
    model_type="llama",
    base="model.",
    settings=(
        *sizes(),
        layers.rope(),
        settings.Choice("hidden_act", "activation", activations.NAMES, "silu"),
        settings.Custom(("attention_bias", "mlp_bias"), _read_biases, _write_biases),
        settings.Unread(("pretraining_tp",)),
        heads("Llama"),
    ),
    rows=(*EMBEDDING_ROWS, *PRE_NORM_ROWS, *ATTENTION_ROWS, *BIAS_ROWS, *MLP_ROWS),
    aliases=ALIASES,
    constants=CONSTANTS,
)

MISTRAL = table.Family(
    model_type="mistral",
    base="model.",
    settings=(
        *sizes(num_kv_heads=8, mlp_dim=14336, max_length=131072),
        layers.rope(),
        layers.window("sliding_window", 4096, lambda theirs: "L", is_fixed=True),
        settings.Choice("hidden_act", "activation", activations.NAMES, "silu"),
        heads("Mistral"),
    ),
    rows=(*EMBEDDING_ROWS, *PRE_NORM_ROWS, *ATTENTION_ROWS, *MLP_ROWS),
    aliases=ALIASES,
    constants=CONSTANTS,
)
