"""ModernBERT (Warner et al. 2024): pre-norm, RoPE, gated, two layers of three local."""

from llm_jax.convert import layers
from llm_jax.convert import settings
from llm_jax.convert import table

_STACK, _THEIRS = "stack/layers", "model.layers.{layer}"


def _kinds(theirs: settings.Json) -> str:
    return "G" + "L" * (theirs.get("global_attn_every_n_layers", 3) - 1)


FAMILY = table.Family(
    model_type="modernbert",
    base="model.",
    settings=(
        settings.Fixed({"architecture": "encoder", "norm": "layernorm", "norm_placement": "pre"}),
        settings.Fixed({"is_gated": True, "use_bias": False, "use_embedding_norm": True}),
        settings.Fixed({"is_entry_normalised": True, "use_head_transform": True}),
        settings.Same("num_hidden_layers", "num_layers", 22),
        settings.Same("hidden_size", "embed_dim", 768),
        settings.Same("num_attention_heads", "num_heads", 12),
        settings.Same("intermediate_size", "mlp_dim", 1152),
        settings.Same("max_position_embeddings", "max_length", 8192),
        settings.Same("vocab_size", "vocab_size", 50368),
        settings.Same("norm_eps", "norm_epsilon", 1e-5),
        settings.Same("tie_word_embeddings", "tie_embeddings", True),
        settings.Same("decoder_bias", "use_head_bias", True),
        settings.Choice("classifier_pooling", "pooling", {"cls": "first", "mean": "mean"}, "cls"),
        # One setting of ours is the activation of blocks and of the head.
        settings.Choice("hidden_activation", "activation", {"gelu": "gelu"}, "gelu"),
        settings.Only("classifier_activation", ("gelu",), "gelu"),
        settings.Only("attention_bias", (False,), False),
        settings.Only("mlp_bias", (False,), False),
        settings.Only("norm_bias", (False,), False),
        settings.Only("classifier_bias", (False,), False),
        layers.rope_by_kind("global_rope_theta", "local_rope_theta", 160_000.0, 10_000.0),
        layers.window("local_attention", 128, _kinds, ("global_attn_every_n_layers",)),
        settings.Dropout(("mlp_dropout", "embedding_dropout"), ("dropout",)),
        settings.Dropout(("attention_dropout",), ("attention_dropout",)),
        settings.Unread(("classifier_dropout", "deterministic_flash_attn", "reference_compile")),
        settings.Unread(
            ("sparse_prediction", "sparse_pred_ignore_index", "repad_logits_with_grad")
        ),
        settings.Unread(("initializer_cutoff_factor", "position_embedding_type", "layer_norm_eps")),
        settings.Heads(
            {
                "ModernBertForMaskedLM": {"head": "lm"},
                "ModernBertModel": {"head": "none"},
                "ModernBertForSequenceClassification": {"head": "sequence"},
                "ModernBertForTokenClassification": {"head": "token"},
                "ModernBertForQuestionAnswering": {"head": "span"},
            }
        ),
    ),
    rows=(
        table.row("embedding/table_VD", "model.embeddings.tok_embeddings.weight"),
        table.row("embedding_norm/scale_D", "model.embeddings.norm.weight"),
        # The first layer reads what the norm of embeddings gives.
        table.row(f"{_STACK}/attention_norm/scale_D", f"{_THEIRS}.attn_norm.weight", first_layer=1),
        table.joined(
            f"{_THEIRS}.attn.Wqkv.weight",
            0,
            (f"{_STACK}/attention/q_DKGC", "(KGC)D"),
            (f"{_STACK}/attention/k_DKC", "(KC)D"),
            (f"{_STACK}/attention/v_DKC", "(KC)D"),
        ),
        table.row(f"{_STACK}/attention/out_KGCD", f"{_THEIRS}.attn.Wo.weight", "D(KGC)"),
        table.row(f"{_STACK}/mlp_norm/scale_D", f"{_THEIRS}.mlp_norm.weight"),
        table.joined(
            f"{_THEIRS}.mlp.Wi.weight",
            0,
            (f"{_STACK}/mlp/gate_DF", "FD"),
            (f"{_STACK}/mlp/up_DF", "FD"),
        ),
        table.row(f"{_STACK}/mlp/out_FD", f"{_THEIRS}.mlp.Wo.weight", "DF"),
        table.row("final_norm/scale_D", "model.final_norm.weight"),
        table.row("head_transform/dense_DM", "head.dense.weight", "MD"),
        table.row("head_transform/norm/scale_D", "head.norm.weight"),
        table.row("head_DV", "decoder.weight", "VD"),
        table.row("head_bias_V", "decoder.bias"),
        table.row("labels/dense_DY", "classifier.weight", "YD"),
        table.row("labels/dense_bias_Y", "classifier.bias"),
    ),
    aliases={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
)
