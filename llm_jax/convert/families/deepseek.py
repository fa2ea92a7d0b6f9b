"""DeepSeek-V2 (DeepSeek-AI 2024a) and -V3 (2024b) with dense layers alone: a Llama that attends to latents.

Of each head the tensors have first what is without a position and then what is rotated, or the values.
"""

import math
from typing import Any

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.convert import layers
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert.families import activations
from llm_jax.convert.families import llama

_ATTENTION, _THEIRS = f"{llama.STACK}/attention", f"{llama.THEIRS}.self_attn"


def _queries(letter: str, name: str) -> table.Row:
    """Returns the row of queries made of what `letter` says, each head's parts side by side."""
    layout = f"HC{letter}"
    parts = (f"{_ATTENTION}/{which}_{letter}HC" for which in ("q", "q_rope"))
    return table.joined(name, 1, *((path, layout) for path in parts), is_merged=True)


ATTENTION_ROWS = (
    _queries("D", f"{_THEIRS}.q_proj.weight"),
    table.row(f"{_ATTENTION}/q_latent_DZ", f"{_THEIRS}.q_a_proj.weight", "ZD"),
    table.row(f"{_ATTENTION}/q_latent_norm/scale_Z", f"{_THEIRS}.q_a_layernorm.weight"),
    _queries("Z", f"{_THEIRS}.q_b_proj.weight"),
    table.joined(
        f"{_THEIRS}.kv_a_proj_with_mqa.weight",
        0,
        (f"{_ATTENTION}/latent_DZ", "ZD"),
        (f"{_ATTENTION}/k_rope_DC", "CD"),
    ),
    table.row(f"{_ATTENTION}/latent_norm/scale_Z", f"{_THEIRS}.kv_a_layernorm.weight"),
    table.joined(
        f"{_THEIRS}.kv_b_proj.weight",
        1,
        (f"{_ATTENTION}/k_ZHC", "HCZ"),
        (f"{_ATTENTION}/v_ZHC", "HCZ"),
        is_merged=True,
    ),
    table.row(f"{_ATTENTION}/out_HCD", f"{_THEIRS}.o_proj.weight", "D(HC)"),
)


def _read_heads(theirs: settings.Json, names: settings.Names) -> settings.Ours:
    del names
    key_heads = theirs.get("num_key_value_heads")
    heads = theirs.get("num_attention_heads", key_heads)
    if key_heads not in (None, heads):
        raise errors.UserError(
            f"num_key_value_heads = {key_heads} with num_attention_heads = {heads} (llm_jax has as"
            " many, or null: every head makes keys of the latent)"
        )
    return {"num_kv_heads": None}


def _write_heads(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
    del original
    return {"num_key_value_heads": model.num_heads}


def _depth(default: int, default_depth: int) -> settings.Setting:
    """Returns the setting of how many layers there are before those of experts: all."""

    def read(theirs: settings.Json, names: settings.Names) -> settings.Ours:
        del names
        depth = theirs.get("num_hidden_layers", default_depth)
        dense = theirs.get("first_k_dense_replace", default)
        if dense < depth:
            raise errors.UserError(
                f"first_k_dense_replace = {dense} with num_hidden_layers = {depth}: layers from"
                f" {dense} on are of experts (llm_jax converts dense ones alone)"
            )
        return {"num_layers": depth}

    def write(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
        del original
        return {"num_hidden_layers": model.num_layers, "first_k_dense_replace": model.num_layers}

    return settings.Custom(("num_hidden_layers", "first_k_dense_replace"), read, write)


# Under which the scaling of rotary positions stands, the first of them that there is.
_SCALINGS = ("rope_parameters", "rope_scaling")
_SHARE = "mscale_all_dim"


def _rope() -> settings.Setting:
    """Returns the setting of rotary positions, and of the scale of scores, which follows from them.

    YaRN sharpens the rotated part of scores by `mscale` over `mscale_all_dim`, and all of them by the
    latter (`yarn_apply_mscale` in their code).
    """
    plain = layers.rope()

    def read(theirs: settings.Json, names: settings.Names) -> settings.Ours:
        ours = plain.read(theirs, names)
        scaling = next((theirs[key] for key in _SCALINGS if theirs.get(key)), {})
        if ours["rope_scaling"] == "none" or not scaling.get(_SHARE):
            return ours | {"attention_scale": None}
        sharper = layers.yarn_scale(scaling["factor"], scaling[_SHARE]) ** 2
        width = theirs.get("qk_nope_head_dim", 128) + theirs.get("qk_rope_head_dim", 64)
        return ours | {"attention_scale": width**-0.5 * sharper}

    def write(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
        theirs: dict[str, Any] = plain.write(model, original)
        share = _share(model)
        for key in _SCALINGS:
            if share is not None and theirs.get(key):
                theirs[key] = theirs[key] | {_SHARE: share}
        return theirs

    return settings.Custom((*plain.theirs,), read, write)


def _share(model: config_lib.ModelConfig) -> float | None:
    """Returns `mscale_all_dim` of a scale of scores; None for the usual one."""
    if model.attention_scale is None or model.rope_scaling == "none":
        return None
    sharper = (model.attention_scale * model.key_width**0.5) ** 0.5
    if math.isclose(sharper, 1.0) or model.rope_scaling_factor <= 1:
        return None
    share = (sharper - 1.0) / (0.1 * math.log(model.rope_scaling_factor))
    # Those that were written have few digits, which roots and logarithms do not keep.
    return round(share, 6) if math.isclose(share, round(share, 6), rel_tol=1e-9) else share


def _sizes(**defaults: int) -> tuple[settings.Setting, ...]:
    keys = {
        "embed_dim": "hidden_size",
        "num_heads": "num_attention_heads",
        "mlp_dim": "intermediate_size",
        "max_length": "max_position_embeddings",
        "vocab_size": "vocab_size",
    }
    latents = {
        "kv_latent_dim": ("kv_lora_rank", 512),
        "q_latent_dim": ("q_lora_rank", 1536),
        "head_dim": ("qk_nope_head_dim", 128),
        "rope_head_dim": ("qk_rope_head_dim", 64),
        "value_head_dim": ("v_head_dim", 128),
        "norm_epsilon": ("rms_norm_eps", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", False),
    }
    return (
        *(settings.Same(key, ours, defaults[ours]) for ours, key in keys.items()),
        *(settings.Same(key, ours, default) for ours, (key, default) in latents.items()),
    )


_COMMON = (
    settings.Custom(("num_key_value_heads",), _read_heads, _write_heads),
    settings.Dropout(("attention_dropout",), ("attention_dropout",)),
    settings.Choice("hidden_act", "activation", activations.NAMES, "silu"),
    settings.Only("attention_bias", (False,), False),
    # Their code gives the norms of latents no epsilon of the config's.
    settings.Fixed({"latent_norm_epsilon": 1e-6}),
    settings.Unread(("head_dim", "qk_head_dim")),  # follow from the widths of a head's parts
    settings.Unread(("pretraining_tp", "num_nextn_predict_layers", "num_mtp_layers")),
    # Of experts, of which there are none.
    settings.Unread(("n_routed_experts", "num_local_experts", "num_experts", "n_shared_experts")),
    settings.Unread(("moe_intermediate_size", "moe_layer_freq", "num_experts_per_tok", "ep_size")),
    settings.Unread(("n_group", "topk_group", "topk_method", "norm_topk_prob", "scoring_func")),
    settings.Unread(("routed_scaling_factor", "aux_loss_alpha", "seq_aux", "output_router_logits")),
)
_ROWS = (*llama.EMBEDDING_ROWS, *llama.PRE_NORM_ROWS, *ATTENTION_ROWS, *llama.MLP_ROWS)

V2 = table.Family(
    model_type="deepseek_v2",
    base="model.",
    settings=(
        _depth(default=0, default_depth=32),
        *_sizes(embed_dim=4096, num_heads=32, mlp_dim=11008, max_length=2048, vocab_size=102400),
        *_COMMON,
        _rope(),
        settings.Fixed({"rope_interleave": True}),
        settings.Only("mlp_bias", (False,), False),
        llama.heads("DeepseekV2"),
    ),
    rows=_ROWS,
    aliases=llama.ALIASES,
    constants=llama.CONSTANTS,
)

V3 = table.Family(
    model_type="deepseek_v3",
    base="model.",
    settings=(
        _depth(default=3, default_depth=61),
        *_sizes(embed_dim=7168, num_heads=128, mlp_dim=18432, max_length=4096, vocab_size=129280),
        *_COMMON,
        _rope(),
        settings.Same("rope_interleave", "rope_interleave", True),
        llama.heads("DeepseekV3"),
    ),
    rows=_ROWS,
    aliases=llama.ALIASES,
    constants=llama.CONSTANTS,
)
