"""When two configs describe one model: what has no effect does not count, nor what only training reads."""

import dataclasses
import itertools
import math
from typing import Any

from llm_jax import config as config_lib
from llm_jax.models import positions

# Read by training and by nothing else: where a family has no such setting, that is said and no error.
TRAINING = ("dropout", "attention_dropout")
LABELLED = ("sequence", "token")  # heads with a number of labels
# How a model is computed, not which it is.
_RUNTIME = ("dtype", "param_dtype", "attention", "attention_chunk", "scan_layers", "remat")
_OF_TRAINING_EXPERTS = (
    *("jitter", "is_router_frozen", "balance_loss", "balance_over", "router_z_loss"),
    *("selection_bias_rate", "relu_penalty_rate", "buffer_factor", "sinkhorn_iterations"),
)
_IRRELEVANT = (*TRAINING, *_RUNTIME, "init_stddev")


def is_same(a: config_lib.ModelConfig, b: config_lib.ModelConfig) -> bool:
    """Returns whether two configs describe one model, in training and out of it."""
    differing = [name for name, *_ in differences(a, b)]
    return not differing and all(getattr(a, name) == getattr(b, name) for name in TRAINING)


def differences(a: config_lib.ModelConfig, b: config_lib.ModelConfig) -> list[tuple[str, Any, Any]]:
    """Returns the fields by which two models compute other things, with both values."""
    left, right = canonical(a), canonical(b)
    found = []
    for field in dataclasses.fields(config_lib.ModelConfig):
        x, y = getattr(left, field.name), getattr(right, field.name)
        is_float = isinstance(x, float) and isinstance(y, float)
        is_equal = math.isclose(x, y, rel_tol=1e-9) if is_float else x == y
        if field.name not in _IRRELEVANT and not is_equal:
            found.append((field.name, x, y))
    return found


def canonical(m: config_lib.ModelConfig) -> config_lib.ModelConfig:
    """Returns a config that is equal for equal models: what has no effect is at its default."""
    pattern = local_and_global(m)
    decided: dict[str, Any] = {
        "num_kv_heads": m.kv_heads,
        "head_dim": m.head_width,
        "mlp_dim": m.mlp_width,
        "attention_scale": m.key_width**-0.5 if m.attention_scale is None else m.attention_scale,
        "layer_pattern": pattern,
        "num_decoder_layers": m.decoder_layers,
        "rope_head_dim": m.rope_head_width,
        "value_head_dim": m.value_width,
        "rope_attention_factor": positions.rotary_factor(m),
        "moe": _canonical_experts(m),
    }
    is_llama3, is_yarn = m.rope_scaling == "llama3", m.rope_scaling == "yarn"
    has_local, has_latents = "L" in pattern, m.kv_latent_dim is not None
    is_lm, has_labels = m.head == "lm", m.head in LABELLED
    effective = {
        ("rope_theta", "rope_fraction", "rope_scaling"): m.positions == "rope",
        ("rope_interleave",): m.positions == "rope",
        ("rope_local_theta",): m.positions == "rope" and has_local,
        ("rope_scaling_factor",): m.positions == "rope" and m.rope_scaling != "none",
        ("rope_low_freq_factor", "rope_high_freq_factor"): m.positions == "rope" and is_llama3,
        ("rope_original_length",): m.positions == "rope" and (is_llama3 or is_yarn),
        ("rope_beta_fast", "rope_beta_slow"): m.positions == "rope" and is_yarn,
        ("rope_attention_factor",): m.positions == "rope" and is_yarn,
        ("rope_head_dim", "value_head_dim", "latent_norm_epsilon"): has_latents,
        ("relative_buckets", "relative_max_distance"): m.positions == "relative",
        ("window",): has_local,
        ("qk_norm",): m.use_qk_norm,
        ("use_qkv_bias",): not m.use_bias,
        ("num_decoder_layers", "decoder_start_id"): m.architecture == "encoder_decoder",
        ("tie_embeddings", "scale_logits", "use_head_bias", "logit_softcap"): is_lm,
        ("use_head_transform",): m.head != "none",
        ("pooling",): m.head == "sequence",
        ("num_labels",): has_labels,
        _IRRELEVANT: False,
    }
    default = config_lib.ModelConfig()
    for names, has_effect in effective.items():
        if not has_effect:
            decided |= {name: getattr(default, name) for name in names}
    return dataclasses.replace(m, **decided)


def _canonical_experts(m: config_lib.ModelConfig) -> config_lib.MoeConfig:
    """Returns the settings of experts without those of training, and of how they are computed."""
    default, moe = config_lib.MoeConfig(), m.moe
    if not moe.is_on:
        return default
    irrelevant = dict.fromkeys(_OF_TRAINING_EXPERTS)
    decided = {name: getattr(default, name) for name in irrelevant}
    decided["expert_dim"] = m.expert_width
    if moe.dispatch != "capacity":
        decided |= {"dispatch": "auto", "capacity_factor": default.capacity_factor}
    return dataclasses.replace(moe, **decided)


def local_and_global(m: config_lib.ModelConfig) -> str:
    """Returns a letter for each layer, L where it has the window; "" where all are global."""
    if m.window is None and m.rope_local_theta is None:
        return ""
    letters = m.layer_pattern or ("L" if m.window is not None else "G")
    spelled = "".join(itertools.islice(itertools.cycle(letters), m.num_layers))
    return spelled if "L" in spelled else ""
