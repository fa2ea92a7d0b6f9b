"""T5 (Raffel et al. 2020): 1.0, and 1.1 with gated GELU and a head of its own."""

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.convert import settings
from llm_jax.convert import table

# In `feed_forward_proj`, after "gated-" or not; T5's gated GELU is the approximate one.
_PLAIN = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}
_GATED = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "gelu_new": "gelu_tanh"}


def _read_mlp(theirs: settings.Json, names: settings.Names) -> settings.Ours:
    del names
    kind = theirs.get("feed_forward_proj", "relu")
    is_gated = kind.startswith("gated-")
    choices = _GATED if is_gated else _PLAIN
    activation = choices.get(kind.removeprefix("gated-"))
    if activation is None:
        known = ", ".join([*_PLAIN, *(f"gated-{name}" for name in _GATED)])
        raise errors.UserError(f"feed_forward_proj = {kind!r} (llm_jax has {known})")
    return {"is_gated": is_gated, "activation": activation}


def _write_mlp(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
    del original
    choices = _GATED if model.is_gated else _PLAIN
    for name, activation in choices.items():
        if activation == model.activation:
            return {"feed_forward_proj": f"gated-{name}" if model.is_gated else name}
    raise errors.UserError(
        f"config.model.activation = {model.activation!r} (it has {', '.join(choices.values())})"
    )


def _read_head(theirs: settings.Json, names: settings.Names) -> settings.Ours:
    """Tied models scale what the head reads.

    transformers 5 writes the scaling by itself, and ties whatever has no head of its own; before that
    the one followed from the other.
    """
    is_tied = theirs.get("tie_word_embeddings", True) is not False
    has_scale = theirs.get("scale_decoder_outputs", is_tied)
    is_tied = is_tied and (has_scale or "lm_head.weight" not in names)
    return {"tie_embeddings": is_tied, "scale_logits": has_scale}


def _write_head(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
    del original
    return {
        "tie_word_embeddings": model.tie_embeddings,
        "scale_decoder_outputs": model.scale_logits,
    }


def _attention(ours: str, theirs: str) -> tuple[table.Row, ...]:
    return (
        table.row(f"{ours}/q_DKGC", f"{theirs}.q.weight", "(KGC)D"),
        table.row(f"{ours}/k_DKC", f"{theirs}.k.weight", "(KC)D"),
        table.row(f"{ours}/v_DKC", f"{theirs}.v.weight", "(KC)D"),
        table.row(f"{ours}/out_KGCD", f"{theirs}.o.weight", "D(KGC)"),
    )


def _stack(side: str, mlp: int) -> tuple[table.Row, ...]:
    """Returns the rows of the encoder or the decoder, whose blocks have their MLP at place `mlp`."""
    ours, theirs = f"{side}/stack/layers", f"{side}.block.{{layer}}.layer"
    first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    gate, dense = f"{ours}/mlp/gate_DF", f"{theirs}.{mlp}.DenseReluDense"
    return (
        table.row(f"{side}/relative/table_KGU", first, "U(KG)"),
        table.row(f"{ours}/attention_norm/scale_D", f"{theirs}.0.layer_norm.weight"),
        *_attention(f"{ours}/attention", f"{theirs}.0.SelfAttention"),
        table.row(f"{ours}/mlp_norm/scale_D", f"{theirs}.{mlp}.layer_norm.weight"),
        table.row(f"{ours}/mlp/up_DF", f"{dense}.wi.weight", "FD", without=gate),
        table.row(gate, f"{dense}.wi_0.weight", "FD"),
        table.row(f"{ours}/mlp/up_DF", f"{dense}.wi_1.weight", "FD", beside=gate),
        table.row(f"{ours}/mlp/out_FD", f"{dense}.wo.weight", "DF"),
        table.row(f"{side}/final_norm/scale_D", f"{side}.final_layer_norm.weight"),
    )


_CROSS, _THEIR_CROSS = "decoder/stack/layers", "decoder.block.{layer}.layer.1"

FAMILY = table.Family(
    model_type="t5",
    settings=(
        settings.Fixed({"architecture": "encoder_decoder", "positions": "relative"}),
        settings.Fixed({"attention_scale": 1.0}),
        settings.Same("num_layers", "num_layers", 6),
        settings.Same("num_decoder_layers", "num_decoder_layers", None),
        settings.Same("d_model", "embed_dim", 512),
        settings.Same("num_heads", "num_heads", 8),
        settings.Same("d_kv", "head_dim", 64),
        settings.Same("d_ff", "mlp_dim", 2048),
        settings.Same("vocab_size", "vocab_size", 32128),
        settings.Same("n_positions", "max_length", 512),
        settings.Same("layer_norm_epsilon", "norm_epsilon", 1e-6),
        settings.Same("relative_attention_num_buckets", "relative_buckets", 32),
        settings.Same("relative_attention_max_distance", "relative_max_distance", 128),
        settings.Same("decoder_start_token_id", "decoder_start_id", 0),
        settings.Custom(("feed_forward_proj",), _read_mlp, _write_mlp),
        settings.Custom(("tie_word_embeddings", "scale_decoder_outputs"), _read_head, _write_head),
        settings.Dropout(("dropout_rate",), ("dropout", "attention_dropout"), 0.1),
        settings.Unread(("initializer_factor", "classifier_dropout", "output_past")),
        settings.Unread(("dense_act_fn", "is_gated_act")),  # follow from feed_forward_proj
        settings.Heads({"T5ForConditionalGeneration": {"head": "lm"}}),
    ),
    rows=(
        table.row("embedding/table_VD", "shared.weight"),
        *_stack("encoder", mlp=1),
        *_stack("decoder", mlp=2),
        table.row(f"{_CROSS}/cross_norm/scale_D", f"{_THEIR_CROSS}.layer_norm.weight"),
        *_attention(f"{_CROSS}/cross_attention", f"{_THEIR_CROSS}.EncDecAttention"),
        table.row("head_DV", "lm_head.weight", "VD"),
    ),
    aliases={
        "lm_head.weight": "shared.weight",
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    constants=(
        # The first release wrote it; nothing ever read it.
        table.Constant("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
    ),
)
