"""BERT (Devlin et al. 2019), with its head of masked tokens or with one of labels."""

import numpy as np

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert.families import activations

_STACK, _THEIRS = "stack/layers", "bert.encoder.layer.{layer}"
_POOLER = "bert.pooler.dense.weight"
_LM = {"head": "lm", "use_head_transform": True, "use_head_bias": True}
_SEQUENCE = {"head": "sequence", "use_head_transform": False, "use_pooler": True}


def _position_ids(model: config_lib.ModelConfig) -> np.ndarray:
    return np.arange(model.max_length)[None]


def _read_pooler(theirs: settings.Json, names: settings.Names) -> settings.Ours:
    """A bare model has a pooler or not, and a head of labels that read no pooled state may keep one."""
    del theirs
    return {"use_pooler": _POOLER in names}


def _read_types(theirs: settings.Json, names: settings.Names) -> settings.Ours:
    del names
    return {"num_token_types": theirs.get("type_vocab_size", 2)}


def _write_types(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
    del original
    if not model.num_token_types:
        raise errors.UserError("config.model.num_token_types = 0 (it has at least 1)")
    return {"type_vocab_size": model.num_token_types}


def _nothing(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
    del model, original
    return {}


def _dense(
    ours: str, theirs: str, layout: str = "MD", head: str = ""
) -> tuple[table.Row, table.Row]:
    """Returns the rows of a dense layer of a head."""
    name, _, _ = ours.rpartition("_")
    bias = f"{name}_bias_{'Y' if layout == 'YD' else 'D'}"
    weight = table.row(ours, f"{theirs}.weight", layout, head=head)
    return weight, table.row(bias, f"{theirs}.bias", head=head)


def _norm(ours: str, theirs: str) -> tuple[table.Row, table.Row]:
    return table.row(f"{ours}/scale_D", f"{theirs}.weight"), table.row(
        f"{ours}/bias_D", f"{theirs}.bias"
    )


FAMILY = table.Family(
    model_type="bert",
    base="bert.",
    settings=(
        settings.Fixed({"architecture": "encoder", "positions": "learned", "norm": "layernorm"}),
        settings.Fixed({"norm_placement": "post", "is_gated": False, "use_bias": True}),
        settings.Fixed({"use_embedding_norm": True, "pooling": "first"}),
        settings.Same("num_hidden_layers", "num_layers", 12),
        settings.Same("hidden_size", "embed_dim", 768),
        settings.Same("num_attention_heads", "num_heads", 12),
        settings.Same("intermediate_size", "mlp_dim", 3072),
        settings.Same("max_position_embeddings", "max_length", 512),
        settings.Same("vocab_size", "vocab_size", 30522),
        settings.Custom(("type_vocab_size",), _read_types, _write_types),
        settings.Same("layer_norm_eps", "norm_epsilon", 1e-12),
        settings.Same("tie_word_embeddings", "tie_embeddings", True),
        settings.Choice("hidden_act", "activation", {"gelu": "gelu"} | activations.NAMES, "gelu"),
        settings.Only("position_embedding_type", ("absolute",), "absolute"),
        settings.Only("is_decoder", (False,), False),
        settings.Only("add_cross_attention", (False,), False),
        settings.Dropout(("hidden_dropout_prob",), ("dropout",), 0.1),
        settings.Dropout(("attention_probs_dropout_prob",), ("attention_dropout",), 0.1),
        settings.Unread(("classifier_dropout", "directionality", "layer_norm_epsilon")),
        settings.Unread(("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers")),
        settings.Unread(("pooler_size_per_head", "pooler_type")),
        settings.Custom((), _read_pooler, _nothing),
        settings.Heads(
            {
                "BertForMaskedLM": _LM,
                "BertForPreTraining": _LM,
                "BertModel": {"head": "none"},
                "BertForSequenceClassification": _SEQUENCE,
                "BertForTokenClassification": {"head": "token", "use_head_transform": False},
                "BertForQuestionAnswering": {"head": "span", "use_head_transform": False},
            }
        ),
    ),
    rows=(
        table.row("embedding/table_VD", "bert.embeddings.word_embeddings.weight"),
        table.row("position_PD", "bert.embeddings.position_embeddings.weight"),
        table.row("token_type_JD", "bert.embeddings.token_type_embeddings.weight"),
        *_norm("embedding_norm", "bert.embeddings.LayerNorm"),
        table.row(f"{_STACK}/attention/q_DKGC", f"{_THEIRS}.attention.self.query.weight", "(KGC)D"),
        table.row(
            f"{_STACK}/attention/q_bias_KGC", f"{_THEIRS}.attention.self.query.bias", "(KGC)"
        ),
        table.row(f"{_STACK}/attention/k_DKC", f"{_THEIRS}.attention.self.key.weight", "(KC)D"),
        table.row(f"{_STACK}/attention/k_bias_KC", f"{_THEIRS}.attention.self.key.bias", "(KC)"),
        table.row(f"{_STACK}/attention/v_DKC", f"{_THEIRS}.attention.self.value.weight", "(KC)D"),
        table.row(f"{_STACK}/attention/v_bias_KC", f"{_THEIRS}.attention.self.value.bias", "(KC)"),
        table.row(
            f"{_STACK}/attention/out_KGCD", f"{_THEIRS}.attention.output.dense.weight", "D(KGC)"
        ),
        table.row(f"{_STACK}/attention/out_bias_D", f"{_THEIRS}.attention.output.dense.bias"),
        *_norm(f"{_STACK}/attention_norm", f"{_THEIRS}.attention.output.LayerNorm"),
        table.row(f"{_STACK}/mlp/up_DF", f"{_THEIRS}.intermediate.dense.weight", "FD"),
        table.row(f"{_STACK}/mlp/up_bias_F", f"{_THEIRS}.intermediate.dense.bias"),
        table.row(f"{_STACK}/mlp/out_FD", f"{_THEIRS}.output.dense.weight", "DF"),
        table.row(f"{_STACK}/mlp/out_bias_D", f"{_THEIRS}.output.dense.bias"),
        *_norm(f"{_STACK}/mlp_norm", f"{_THEIRS}.output.LayerNorm"),
        *_dense("pooler/dense_DM", "bert.pooler.dense"),
        *_dense("head_transform/dense_DM", "cls.predictions.transform.dense"),
        *_norm("head_transform/norm", "cls.predictions.transform.LayerNorm"),
        table.row("head_DV", "cls.predictions.decoder.weight", "VD"),
        table.row("head_bias_V", "cls.predictions.bias"),
        *_dense("labels/dense_DY", "classifier", "YD", "sequence"),
        *_dense("labels/dense_DY", "classifier", "YD", "token"),
        *_dense("labels/dense_DY", "qa_outputs", "YD", "span"),
    ),
    aliases={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    constants=(table.Constant("bert.embeddings.position_ids", _position_ids),),
    spellings=(
        ("LayerNorm.weight", "LayerNorm.gamma"),
        ("LayerNorm.bias", "LayerNorm.beta"),
    ),
)
