"""Marian's translators (Junczys-Dowmunt et al. 2018): the Transformer of Vaswani et al. 2017."""

import numpy as np

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert.families import activations


def _sinusoids(model: config_lib.ModelConfig) -> np.ndarray:
    """Returns the table of positions that older files hold, computed as transformers does."""
    width = model.embed_dim
    places = np.arange(model.max_length)[:, None]
    angles = places / np.power(10_000, 2 * (np.arange(width) // 2) / width)
    return np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], 1)


def _alike(ours: str, keys: tuple[str, str], default: int) -> settings.Setting:
    """Returns a setting that encoder and decoder have apart in theirs, and together in ours."""

    def read(theirs: settings.Json, names: settings.Names) -> settings.Ours:
        del names
        values = {key: theirs.get(key, default) for key in keys}
        if len(set(values.values())) > 1:
            raise errors.UserError(
                f"{' and '.join(f'{key} = {v}' for key, v in values.items())} (llm_jax has one)"
            )
        return {ours: values[keys[0]]}

    def write(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
        del original
        return dict.fromkeys(keys, getattr(model, ours))

    return settings.Custom(keys, read, write)


def _read_vocabulary(theirs: settings.Json, names: settings.Names) -> settings.Ours:
    del names
    size = theirs.get("vocab_size", 58101)
    other = theirs.get("decoder_vocab_size")
    if other not in (None, size):
        raise errors.UserError(f"decoder_vocab_size = {other} (llm_jax has one of {size} for both)")
    return {"vocab_size": size}


def _write_vocabulary(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
    del original
    return {"vocab_size": model.vocab_size, "decoder_vocab_size": model.vocab_size}


def _attention(ours: str, theirs: str) -> tuple[table.Row, ...]:
    return (
        table.row(f"{ours}/q_DKGC", f"{theirs}.q_proj.weight", "(KGC)D"),
        table.row(f"{ours}/q_bias_KGC", f"{theirs}.q_proj.bias", "(KGC)"),
        table.row(f"{ours}/k_DKC", f"{theirs}.k_proj.weight", "(KC)D"),
        table.row(f"{ours}/k_bias_KC", f"{theirs}.k_proj.bias", "(KC)"),
        table.row(f"{ours}/v_DKC", f"{theirs}.v_proj.weight", "(KC)D"),
        table.row(f"{ours}/v_bias_KC", f"{theirs}.v_proj.bias", "(KC)"),
        table.row(f"{ours}/out_KGCD", f"{theirs}.out_proj.weight", "D(KGC)"),
        table.row(f"{ours}/out_bias_D", f"{theirs}.out_proj.bias"),
    )


def _norm(ours: str, theirs: str) -> tuple[table.Row, ...]:
    scale = table.row(f"{ours}/scale_D", f"{theirs}.weight")
    return scale, table.row(f"{ours}/bias_D", f"{theirs}.bias")


def _stack(side: str) -> tuple[table.Row, ...]:
    ours, theirs = f"{side}/stack/layers", f"model.{side}.layers.{{layer}}"
    return (
        *_attention(f"{ours}/attention", f"{theirs}.self_attn"),
        *_norm(f"{ours}/attention_norm", f"{theirs}.self_attn_layer_norm"),
        table.row(f"{ours}/mlp/up_DF", f"{theirs}.fc1.weight", "FD"),
        table.row(f"{ours}/mlp/up_bias_F", f"{theirs}.fc1.bias"),
        table.row(f"{ours}/mlp/out_FD", f"{theirs}.fc2.weight", "DF"),
        table.row(f"{ours}/mlp/out_bias_D", f"{theirs}.fc2.bias"),
        *_norm(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm"),
    )


_DECODER, _THEIR_DECODER = "decoder/stack/layers", "model.decoder.layers.{layer}"

FAMILY = table.Family(
    model_type="marian",
    settings=(
        settings.Fixed({"architecture": "encoder_decoder", "positions": "sinusoidal"}),
        settings.Fixed({"norm": "layernorm", "norm_placement": "post", "norm_epsilon": 1e-5}),
        settings.Fixed({"is_gated": False, "use_bias": True, "use_head_bias": True}),
        settings.Same("encoder_layers", "num_layers", 12),
        settings.Same("decoder_layers", "num_decoder_layers", 12),
        settings.Same("d_model", "embed_dim", 1024),
        settings.Same("max_position_embeddings", "max_length", 1024),
        settings.Same("scale_embedding", "scale_embeddings", False),
        settings.Same("tie_word_embeddings", "tie_embeddings", True),
        settings.Same("decoder_start_token_id", "decoder_start_id", 58100),
        _alike("num_heads", ("encoder_attention_heads", "decoder_attention_heads"), 16),
        _alike("mlp_dim", ("encoder_ffn_dim", "decoder_ffn_dim"), 4096),
        settings.Custom(("vocab_size", "decoder_vocab_size"), _read_vocabulary, _write_vocabulary),
        settings.Choice(
            "activation_function", "activation", {"gelu": "gelu"} | activations.NAMES, "gelu"
        ),
        settings.Only("share_encoder_decoder_embeddings", (True,), True),
        settings.Only("normalize_before", (False,), False),
        settings.Only("normalize_embedding", (False,), False),
        settings.Only("add_final_layer_norm", (False,), False),
        settings.Only("static_position_embeddings", (True,), True),
        settings.Dropout(("dropout",), ("dropout",), 0.1),
        settings.Dropout(("attention_dropout",), ("attention_dropout",)),
        settings.Unread(("activation_dropout", "classifier_dropout", "classif_dropout")),
        settings.Unread(("encoder_layerdrop", "decoder_layerdrop", "init_std", "add_bias_logits")),
        settings.Unread(("extra_pos_embeddings", "num_hidden_layers")),
        settings.Unread(("max_length", "num_beams", "forced_eos_token_id")),  # of generation
        settings.Heads({"MarianMTModel": {"head": "lm"}}),
    ),
    rows=(
        table.row("embedding/table_VD", "model.shared.weight"),
        *_stack("encoder"),
        *_stack("decoder"),
        *_attention(f"{_DECODER}/cross_attention", f"{_THEIR_DECODER}.encoder_attn"),
        *_norm(f"{_DECODER}/cross_norm", f"{_THEIR_DECODER}.encoder_attn_layer_norm"),
        table.row("head_DV", "lm_head.weight", "VD"),
        table.row("head_bias_V", "final_logits_bias", "1V"),
    ),
    aliases={
        "lm_head.weight": "model.shared.weight",
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
    },
    constants=(
        table.Constant("model.encoder.embed_positions.weight", _sinusoids),
        table.Constant("model.decoder.embed_positions.weight", _sinusoids),
    ),
)
