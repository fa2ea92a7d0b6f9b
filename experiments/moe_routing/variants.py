"""The routers that are compared, as configs: `--config=experiments/moe_routing/variants.py:NAME`.

All decoders train on the same bytes, and all encoders on the same masked ones. A token runs products of the
same size in each of them but `dense_params`, which is as large as the mixtures; `check_budgets` holds them
to it. Two experts of a token are half as wide as one alone.
"""

from typing import Any

from llm_jax import config as config_lib
from llm_jax import flops

STEPS = 300
_LENGTH = 64  # tokens of a row
_WIDTH = 512  # of the feed-forward part that a token runs
_TOTAL = 2048  # of all experts

_PAIR = {"num_experts": 8, "experts_per_token": 2, "expert_dim": _WIDTH // 2}
_ONE = {"num_experts": 4, "experts_per_token": 1, "expert_dim": _WIDTH}
_UNBALANCED = {"balance_loss": 0.0}
# Runs are short: biases move ten times as far in a step as in DeepSeek-V3.
_BIASED = {"router": "sigmoid", "use_selection_bias": True, "selection_bias_rate": 0.01}
_SHARED = {
    "num_experts": 7,
    "experts_per_token": 1,
    "num_shared_experts": 1,
    "expert_dim": _WIDTH // 2,
}

# What a variant changes of `model.moe`, or of `model` where there are no experts.
DECODERS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense_params": {"mlp_dim": _TOTAL},
    "softmax": _PAIR,
    "softmax_unbalanced": _PAIR | _UNBALANCED,
    "softmax_raw": _PAIR | {"normalise_weights": False},
    "sigmoid": _PAIR | {"router": "sigmoid"},
    "sigmoid_bias": _PAIR | _BIASED | _UNBALANCED,
    "sigmoid_groups": _PAIR | {"router": "sigmoid", "num_groups": 4, "groups_per_token": 2},
    "shared": _SHARED,
    "switch": _ONE | {"router": "switch", "jitter": 0.01, "dispatch": "capacity"},
    "gshard": _PAIR | {"router": "gshard", "dispatch": "capacity", "capacity_factor": 2.0},
    "sinkhorn": _PAIR | {"router": "sinkhorn"},
    "base": _ONE | {"router": "base"},
    "relu": _PAIR | {"router": "relu"},
    "hash": _ONE | {"router": "hash"},
    "random": _PAIR | {"router": "random"},
    "frozen": _PAIR | {"is_router_frozen": True},
}
# A decoder would learn from the future with the last two.
ENCODERS: dict[str, dict[str, Any]] = {
    "mlm_dense": {},
    "mlm_softmax": _PAIR,
    "mlm_expert_choice": _PAIR | {"router": "expert_choice", "capacity_factor": 1.0},
    "mlm_soft": {"num_experts": 8, "router": "soft", "slots_per_expert": 7, "expert_dim": _WIDTH},
}
VARIANTS = DECODERS | ENCODERS


def get_config(arg: str = "softmax"):
    """Returns the config of a variant."""
    config = config_lib.new()
    config.model.update(
        num_layers=4,
        embed_dim=128,
        num_heads=4,
        mlp_dim=_WIDTH,
        vocab_size=256,
        max_length=_LENGTH,
        activation="gelu_tanh",
        is_gated=False,
    )
    config.data.update(batch_size=16, sequence_length=_LENGTH, packing="concat")
    config.optim.update(learning_rate=2e-3, warmup_steps=40)
    config.train.update(num_steps=STEPS, eval_every=STEPS, eval_steps=40, log_every=20)
    config.checkpoint.every = 0
    apply(config, arg)
    return config


def full_size(arg: str):
    """Returns the config of `configs/moe_8x150m.py` with a variant's routing and its shares of the width."""
    from configs import moe_8x150m

    config = moe_8x150m.get_config()
    width = config.model.mlp_dim
    config.model.update(mlp_dim=2 * width)
    kept = {name: config.model.moe[name] for name in ("router_z_loss", "buffer_factor")}
    config.model.moe = config_lib.new().model.moe
    config.model.moe.update(kept)
    apply(config, arg, scale=2 * width / _WIDTH)
    if config.model.moe.router == "soft":
        config.data.packing = "concat"  # slots mix the tokens of a row, and grow with it
        config.model.moe.slots_per_expert *= config.data.sequence_length // _LENGTH
    if not VARIANTS[arg].get("num_experts"):
        config.mesh.update(rules="fsdp", expert=1)
    elif VARIANTS[arg]["num_experts"] % config.mesh.expert:
        config.model.moe.num_experts = 8  # seven do not divide over devices
    return config


def apply(config: Any, name: str, scale: float = 1.0) -> None:
    """Changes a config to a variant, widths times `scale`."""
    if name not in VARIANTS:
        raise ValueError(f"variant {name!r} is none of {', '.join(VARIANTS)}")
    changes = dict(VARIANTS[name])
    for width in ("mlp_dim", "expert_dim"):
        if width in changes:
            changes[width] = round(changes[width] * scale)
    (config.model.moe if "num_experts" in changes else config.model).update(changes)
    if name in ENCODERS:
        config.model.update(architecture="encoder", vocab_size=config.model.vocab_size + 128)
        config.objective.update(name="mlm")


def check_budgets(tolerance: float = 0.025) -> dict[str, float]:
    """Returns how many operations a token costs in each variant, forward.

    Raises:
      ValueError: one of them differs from the dense one by more than `tolerance`, `dense_params` apart.
    """
    found = {name: _forward_flops(name) for name in VARIANTS}
    for name, value in found.items():
        baseline = found["mlm_dense" if name in ENCODERS else "dense"]
        if name != "dense_params" and abs(value / baseline - 1) > tolerance:
            raise ValueError(f"{name} costs {value / baseline:.3f} of what the dense model does")
    return found


def _forward_flops(name: str) -> float:
    config = config_lib.from_config_dict(get_config(name))
    return flops.forward_flops_per_token(config.model, config.data.sequence_length)
