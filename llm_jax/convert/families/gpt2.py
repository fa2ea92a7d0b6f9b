"""GPT-2 (Radford et al. 2019). Its matrices have inputs first, and queries, keys and values in one."""

import numpy as np

from llm_jax import config as config_lib
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert.families import activations

_STACK, _THEIRS = "stack/layers", "transformer.h.{layer}"


def _seen(model: config_lib.ModelConfig) -> np.ndarray:
    """Returns the causal mask that older files hold for each layer."""
    return np.tri(model.max_length, dtype=bool)[None, None]


FAMILY = table.Family(
    model_type="gpt2",
    base="transformer.",
    settings=(
        settings.Fixed({"positions": "learned", "norm": "layernorm"}),
        settings.Fixed({"is_gated": False, "use_bias": True}),
        settings.Same("n_layer", "num_layers", 12),
        settings.Same("n_embd", "embed_dim", 768),
        settings.Same("n_head", "num_heads", 12),
        settings.Same("n_inner", "mlp_dim", None),
        settings.Same("n_positions", "max_length", 1024),
        settings.Same("vocab_size", "vocab_size", 50257),
        settings.Same("layer_norm_epsilon", "norm_epsilon", 1e-5),
        settings.Same("tie_word_embeddings", "tie_embeddings", True),
        settings.Choice("activation_function", "activation", activations.NAMES, "gelu_new"),
        settings.Only("scale_attn_weights", (True,), True),
        settings.Only("scale_attn_by_inverse_layer_idx", (False,), False),
        settings.Only("add_cross_attention", (False,), False),
        settings.Dropout(("resid_pdrop", "embd_pdrop"), ("dropout",), 0.1),
        settings.Dropout(("attn_pdrop",), ("attention_dropout",), 0.1),
        settings.Unread(("n_ctx", "reorder_and_upcast_attn")),
        settings.Unread(("summary_type", "summary_use_proj", "summary_activation")),
        settings.Unread(("summary_proj_to_labels", "summary_first_dropout")),
        settings.Heads({"GPT2LMHeadModel": {"head": "lm"}, "GPT2Model": {"head": "none"}}),
    ),
    rows=(
        table.row("embedding/table_VD", "transformer.wte.weight"),
        table.row("position_PD", "transformer.wpe.weight"),
        table.row(f"{_STACK}/attention_norm/scale_D", f"{_THEIRS}.ln_1.weight"),
        table.row(f"{_STACK}/attention_norm/bias_D", f"{_THEIRS}.ln_1.bias"),
        table.joined(
            f"{_THEIRS}.attn.c_attn.weight",
            1,
            (f"{_STACK}/attention/q_DKGC", "D(KGC)"),
            (f"{_STACK}/attention/k_DKC", "D(KC)"),
            (f"{_STACK}/attention/v_DKC", "D(KC)"),
        ),
        table.joined(
            f"{_THEIRS}.attn.c_attn.bias",
            0,
            (f"{_STACK}/attention/q_bias_KGC", "(KGC)"),
            (f"{_STACK}/attention/k_bias_KC", "(KC)"),
            (f"{_STACK}/attention/v_bias_KC", "(KC)"),
        ),
        table.row(f"{_STACK}/attention/out_KGCD", f"{_THEIRS}.attn.c_proj.weight", "(KGC)D"),
        table.row(f"{_STACK}/attention/out_bias_D", f"{_THEIRS}.attn.c_proj.bias"),
        table.row(f"{_STACK}/mlp_norm/scale_D", f"{_THEIRS}.ln_2.weight"),
        table.row(f"{_STACK}/mlp_norm/bias_D", f"{_THEIRS}.ln_2.bias"),
        table.row(f"{_STACK}/mlp/up_DF", f"{_THEIRS}.mlp.c_fc.weight"),
        table.row(f"{_STACK}/mlp/up_bias_F", f"{_THEIRS}.mlp.c_fc.bias"),
        table.row(f"{_STACK}/mlp/out_FD", f"{_THEIRS}.mlp.c_proj.weight"),
        table.row(f"{_STACK}/mlp/out_bias_D", f"{_THEIRS}.mlp.c_proj.bias"),
        table.row("final_norm/scale_D", "transformer.ln_f.weight"),
        table.row("final_norm/bias_D", "transformer.ln_f.bias"),
        table.row("head_DV", "lm_head.weight", "VD"),
    ),
    aliases={"lm_head.weight": "transformer.wte.weight"},
    constants=(
        table.Constant(f"{_THEIRS}.attn.bias", _seen),
        table.Constant(f"{_THEIRS}.attn.masked_bias"),
    ),
)
