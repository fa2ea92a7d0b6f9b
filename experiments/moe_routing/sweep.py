"""Routers of mixtures of experts, at equal operations of a token: decoders, and encoders for those that see a whole row.

All decoders train on the same bytes, and all encoders on the same masked ones. A token runs products of the same size
in each of them but `dense_params`, which is as large as the mixtures. Two experts of a token are half as wide as one.
"""

from collections.abc import Sequence
import math
from typing import Any

import matplotlib.figure
import numpy as np

from llm_jax import config as config_lib
from llm_jax.lab import analysis
from llm_jax.lab import sweep

_STEPS = 300
_LENGTH = 64  # tokens of a row
_WIDTH = 512  # of the feed-forward part that a token runs
_TOTAL = 2048  # of all experts
_VIOLATION, _LOAD = "moe/max_violation", "moe/layers/load"

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
_DECODERS: dict[str, dict[str, Any]] = {
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
_ENCODERS: dict[str, dict[str, Any]] = {
    "mlm_dense": {},
    "mlm_softmax": _PAIR,
    "mlm_expert_choice": _PAIR | {"router": "expert_choice", "capacity_factor": 1.0},
    "mlm_soft": {"num_experts": 8, "router": "soft", "slots_per_expert": 7, "expert_dim": _WIDTH},
}


def base():
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
    config.train.update(num_steps=_STEPS, eval_every=_STEPS, eval_steps=40, log_every=20)
    config.checkpoint.every = 0
    return config


def _changes(name: str, scale: float = 1.0) -> dict[str, Any]:
    """Returns what a variant changes of a model, widths times `scale`."""
    changes = dict((_DECODERS | _ENCODERS)[name])
    for width in ("mlp_dim", "expert_dim"):
        if width in changes:
            changes[width] = round(changes[width] * scale)
    section = "model.moe" if "num_experts" in changes else "model"
    return {f"{section}.{key}": value for key, value in changes.items()}


def _variant(name: str) -> sweep.Variant:
    changes, is_encoder = _changes(name), name in _ENCODERS
    if is_encoder:
        # Room for the id of the mask.
        changes |= {
            "model.architecture": "encoder",
            "model.vocab_size": 384,
            "objective.name": "mlm",
        }
    group = "encoders" if is_encoder else "decoders"
    return sweep.Variant(name, changes, is_exempt=name == "dense_params", group=group)


def full_size(name: str):
    """Returns the config of `configs/moe_8x150m.py` with a variant's routing and its shares of the width."""
    from configs import moe_8x150m

    config = moe_8x150m.get_config()
    width = config.model.mlp_dim
    config.model.update(mlp_dim=2 * width)
    kept = {key: config.model.moe[key] for key in ("router_z_loss", "buffer_factor")}
    config.model.moe = config_lib.new().model.moe
    config.model.moe.update(kept)
    sweep.apply(config, _changes(name, scale=2 * width / _WIDTH))
    if name in _ENCODERS:
        config.model.update(architecture="encoder", vocab_size=config.model.vocab_size + 128)
        config.objective.name = "mlm"
    moe = config.model.moe
    if moe.router == "soft":
        config.data.packing = "concat"  # slots mix the tokens of a row, and grow with it
        moe.slots_per_expert *= config.data.sequence_length // _LENGTH
    if not moe.num_experts:
        config.mesh.update(rules="fsdp", expert=1)
    elif moe.num_experts % config.mesh.expert:
        moe.num_experts = 8  # seven do not divide over devices
    return config


# What stands beside what, what the literature says of it, and whether a higher loss is what it says.
_CLAIMS = (
    (
        "softmax",
        "dense",
        "experts beat the dense model of equal operations (Shazeer et al. 2017)",
        "better",
    ),
    ("switch", "dense", "so does one expert a token (Fedus et al. 2021)", "better"),
    ("dense_params", "softmax", "a dense model of as many parameters is better still", "better"),
    ("hash", "switch", "hashing is close to a learned choice (Roller et al. 2021)", "no worse"),
    ("random", "softmax", "learned routing beats chance", "worse"),
    ("frozen", "softmax", "and a router that does not learn", "worse"),
    (
        "mlm_expert_choice",
        "mlm_softmax",
        "experts that choose tokens beat tokens that choose (Zhou et al. 2022)",
        "better",
    ),
    (
        "mlm_soft",
        "mlm_softmax",
        "so do soft mixtures (Puigcerver et al. 2023, of images)",
        "better",
    ),
)
_BALANCED = (("sigmoid_bias", "softmax_unbalanced"), ("sigmoid_bias", "softmax"))


def findings(table: analysis.Table) -> list[analysis.Finding]:
    """Holds routers to the literature."""
    pairs = [*((one, other) for one, other, _, _ in _CLAIMS), *_BALANCED]
    cells = [(table.row(one).cell, table.row(other).cell) for one, other in pairs]
    compared = table.contrasts(cells)
    free, none, loss = (
        analysis.mean_of(table.row(name).cell.ends(_VIOLATION))
        for name in ("sigmoid_bias", "softmax_unbalanced", "softmax")
    )
    against_none, against_loss = compared[len(_CLAIMS) :]
    text = (
        f"Balance without a loss (Wang et al. 2024: the violation several-fold lower, at no cost): violation {free:.3f},"
        f" {none:.3f} without balancing, {loss:.3f} with the balance loss; loss {against_none.difference.mean:+.3f}"
        f" ({against_none.verdict}) and {against_loss.difference.mean:+.3f} ({against_loss.verdict}) against these."
    )
    is_free = all(one.bears_out("no worse") for one in (against_none, against_loss))
    found = [
        analysis.Finding(text, bool(free < none / 3 and is_free), f"violation / {none / free:.0f}")
    ]
    for (one, other, claim, wanted), comparison in zip(_CLAIMS, compared, strict=False):
        change, verdict = comparison.difference, comparison.verdict
        text = f"{one} against {other}: {change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}], {verdict} (paper: {claim})."
        holds = comparison.bears_out(wanted)
        found.append(analysis.Finding(text, holds, f"{one} {change.mean:+.3f}"))
    return found


def pictures(table: analysis.Table) -> dict[str, tuple[matplotlib.figure.Figure, str]]:
    """Draws the load of each expert over the steps, of the first seed's second layer."""
    loads = {row.variant: row.cell.by_seed[0]["curves"][_LOAD] for row in table.rows}
    loads = {name: points for name, points in loads.items() if points}
    columns = 4
    rows = math.ceil(len(loads) / columns)
    figure = matplotlib.figure.Figure(figsize=(3.2 * columns, 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for place, (name, points) in zip(axes.flat, loads.items()):
        image = _heat_map(place, name, points)
    for place in axes.flat[len(loads) :]:
        place.axis("off")
    figure.colorbar(image, ax=axes, label="load over an even share")
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("expert", fontsize=8)
    return {
        "load": (
            figure,
            "Load of experts over steps: second layer, first seed; 1 is an even share.",
        )
    }


def _heat_map(place: Any, name: str, points: Sequence[Any]) -> Any:
    steps, loads = zip(*points)
    of_layer = np.asarray(loads)[:, 1].T
    share = of_layer / of_layer.sum(0, keepdims=True) * len(of_layer)
    extent = (steps[0], steps[-1], len(of_layer), 0)
    place.set_title(name, fontsize=8)
    place.tick_params(labelsize=6)
    return place.imshow(share, aspect="auto", vmin=0, vmax=2, cmap="viridis", extent=extent)


SWEEP = sweep.Sweep(
    name="moe_routing",
    claim="learned routers beat a dense model of equal operations, and need no loss to be balanced",
    source="Shazeer et al. 2017; Fedus et al. 2021; Roller et al. 2021; Zhou et al. 2022; Wang et al. 2024",
    base=base,
    variants=tuple(map(_variant, [*_DECODERS, *_ENCODERS])),
    baseline="dense",
    budgets=(sweep.Budget("tokens"), sweep.Budget("flops", 0.025)),
    smallest=0.01,
    kept=(_VIOLATION, "moe/load_entropy", "moe/dead_experts", "moe/drop_fraction", _LOAD),
    columns={
        "violation": _VIOLATION,
        "entropy": "moe/load_entropy",
        "dead": "moe/dead_experts",
        "dropped": "moe/drop_fraction",
    },
    full_size=full_size,
    findings=findings,
    pictures=pictures,
)
get_config = SWEEP.get_config
