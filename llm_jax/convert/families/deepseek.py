"""DeepSeek-V2 (DeepSeek-AI 2024a) and -V3 (2024b): a Llama that attends to latents, with many small experts.

Of each head the tensors have first what is without a position and then what is rotated, or the values.
"""

import dataclasses
import math
from typing import Any

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.convert import layers
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert.families import activations
from llm_jax.convert.families import experts
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


# Of ours and theirs; those that only V3 has, or V2, are not among them.
_EXPERT_KEYS = {
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_dim": "moe_intermediate_size",
    "num_shared_experts": "n_shared_experts",
    "first_dense_layers": "first_k_dense_replace",
    "weight_scale": "routed_scaling_factor",
}
_GROUP_KEYS = {"num_groups": "n_group", "groups_per_token": "topk_group"}
_METHOD, _GREEDY, _IN_GROUPS = "topk_method", "greedy", "group_limited_greedy"


def _experts(depth: int, fixed: dict[str, Any], **defaults: int | float) -> settings.Setting:
    """Returns the setting of layers and their experts, of which a model of dense layers has none.

    Args:
      depth: of a config that does not say.
      fixed: of all models of the version; where the router is of V2, `topk_method` says whether it goes
        by groups, and weights are what the softmax gave.
      defaults: of a config that does not say, by our names.
    """
    is_v2 = fixed["router"] == "softmax"
    keys = _EXPERT_KEYS | _GROUP_KEYS
    if not is_v2:
        keys |= {"normalise_weights": "norm_topk_prob"}
    names = ("num_hidden_layers", *keys.values(), *([_METHOD] if is_v2 else []))

    def read(theirs: settings.Json, tensors: settings.Names) -> settings.Ours:
        del tensors
        num_layers = theirs.get("num_hidden_layers", depth)
        ours = {name: theirs.get(key, defaults.get(name)) for name, key in keys.items()}
        if ours["first_dense_layers"] >= num_layers:
            return {"num_layers": num_layers, "moe": config_lib.MoeConfig()}
        method = theirs.get(_METHOD, _GREEDY)
        if is_v2 and method not in (_GREEDY, _IN_GROUPS):
            raise errors.UserError(f"{_METHOD} = {method!r} (llm_jax has {_GREEDY}, {_IN_GROUPS})")
        if is_v2 and method == _GREEDY:
            ours |= dict.fromkeys(_GROUP_KEYS, 1)
        return {"num_layers": num_layers, "moe": config_lib.MoeConfig(**fixed | ours)}

    def write(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
        del original
        written = {"num_hidden_layers": model.num_layers}
        if not model.moe.is_on:
            return written | {"first_k_dense_replace": model.num_layers}
        moe = dataclasses.replace(model.moe, expert_dim=model.expert_width)
        written |= {key: getattr(moe, name) for name, key in keys.items()}
        return written | ({_METHOD: _IN_GROUPS if moe.num_groups > 1 else _GREEDY} if is_v2 else {})

    return settings.Custom(names, read, write)


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
    settings.Unread(("num_local_experts", "num_experts", "moe_layer_freq", "ep_size")),
    settings.Unread(("aux_loss_alpha", "seq_aux", "output_router_logits")),  # of training
)
_LAYER_ROWS = (*llama.PRE_NORM_ROWS, *ATTENTION_ROWS)
_SHARED, _THEIR_SHARED = f"{experts.STACK}/mlp/shared", f"{llama.THEIRS}.mlp.shared_experts"
_ROWS = (
    *llama.EMBEDDING_ROWS,
    *_LAYER_ROWS,
    *llama.MLP_ROWS,
    *experts.rows(_LAYER_ROWS, "mlp", "gate_proj", "up_proj", "down_proj"),
    table.row(
        f"{experts.STACK}/mlp/router/selection_bias_E",
        f"{llama.THEIRS}.mlp.gate.e_score_correction_bias",
    ),
    table.row(f"{_SHARED}/gate_DF", f"{_THEIR_SHARED}.gate_proj.weight", "FD"),
    table.row(f"{_SHARED}/up_DF", f"{_THEIR_SHARED}.up_proj.weight", "FD"),
    table.row(f"{_SHARED}/out_FD", f"{_THEIR_SHARED}.down_proj.weight", "DF"),
)

V2 = table.Family(
    model_type="deepseek_v2",
    base="model.",
    settings=(
        _experts(
            32,
            {"router": "softmax", "normalise_weights": False},
            num_experts=64,
            num_shared_experts=2,
            first_dense_layers=0,
            weight_scale=1.0,
            expert_dim=1407,
        ),
        settings.Unread(("norm_topk_prob", "scoring_func")),  # which their code does not read
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
        _experts(
            61,
            {"router": "sigmoid", "use_selection_bias": True},
            num_experts=256,
            experts_per_token=8,
            num_shared_experts=1,
            first_dense_layers=3,
            weight_scale=2.5,
            expert_dim=2048,
            num_groups=8,
            groups_per_token=4,
            normalise_weights=True,
        ),
        settings.Only("scoring_func", ("sigmoid",), "sigmoid"),
        settings.Only("topk_method", ("noaux_tc",), "noaux_tc"),
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
