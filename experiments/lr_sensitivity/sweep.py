"""Learning rates over three orders of magnitude, with what is said to make models insensitive to them."""

import numpy as np

from experiments import small
from llm_jax.lab import analysis
from llm_jax.lab import statistics
from llm_jax.lab import sweep

_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_NO_MODEL = 5.55  # nats a byte: log 256
_LOGIT = "telemetry/max_attention_logit"


def base():
    config = small.decoder()
    config.train.update(num_steps=400, eval_every=100, eval_steps=40, telemetry_every=40)
    # That of the paper: it does not shrink with the learning rate.
    config.optim.update(weight_decay=1e-4, is_decay_independent=True, warmup_steps=40)
    return config


def sensitivity(table: analysis.Table, name: str) -> dict[int, float]:
    """Returns by seed the mean over rates of what is lost against the best one (Wortsman et al. 2023, section 2.2)."""
    found = {}
    for seed in range(table.sweep.seeds):
        losses = []
        for rate in _RATES:
            values = table.cell(name, learning_rate=rate).values()
            losses.append(min(values[seed], _NO_MODEL) if seed in values else _NO_MODEL)
        found[seed] = float(np.mean(losses) - min(losses))
    return found


def findings(table: analysis.Table) -> list[analysis.Finding]:
    """Holds each intervention to its effect on the sensitivity."""
    plain = sensitivity(table, "plain")
    found = []
    for name, wanted in (
        ("qk_norm", "lowers it"),
        ("z_loss", "lowers it at the highest rates"),
        ("coupled_decay", "raises it"),
        ("no_warmup", "raises it"),
    ):
        own = sensitivity(table, name)
        change = statistics.interval([own[seed] - plain[seed] for seed in plain])
        is_lower = wanted.startswith("lowers")
        is_shown = change.high < 0 if is_lower else change.low > 0
        is_against = change.low > 0 if is_lower else change.high < 0
        text = (
            f"{name}: sensitivity {np.mean(list(own.values())):.3f} against {np.mean(list(plain.values())):.3f},"
            f" {change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}] (paper: {wanted})."
        )
        holds = True if is_shown else False if is_against else None
        found.append(analysis.Finding(text, holds, f"{name} {change.mean:+.2f}"))
    largest = {}
    for name in ("plain", "qk_norm"):
        curve = table.cell(name, learning_rate=_RATES[-2]).by_seed
        rows = [row["curves"][_LOGIT] for row in curve.values() if row["curves"][_LOGIT]]
        largest[name] = float(np.mean([max(map(max, (v for _, v in one))) for one in rows]))
    text = (
        f"at a rate of {_RATES[-2]:g} the largest attention logit reaches {largest['plain']:.0f} without, and"
        f" {largest['qk_norm']:.0f} with norms of queries and keys (paper: they bound it)."
    )
    found.append(analysis.Finding(text, largest["qk_norm"] < largest["plain"]))
    return found


SWEEP = sweep.Sweep(
    name="lr_sensitivity",
    claim="norms of queries and keys, z-loss, independent decay and warmup make the learning rate matter less",
    source="Wortsman et al. 2023",
    base=base,
    variants=(
        sweep.Variant("plain"),
        sweep.Variant("qk_norm", {"model.use_qk_norm": True}),
        sweep.Variant("z_loss", {"train.z_loss": 1e-4}),
        sweep.Variant("qk_norm_z_loss", {"model.use_qk_norm": True, "train.z_loss": 1e-4}),
        sweep.Variant(
            "coupled_decay", {"optim.is_decay_independent": False, "optim.weight_decay": 0.1}
        ),
        sweep.Variant("no_warmup", {"optim.warmup_steps": 0}),
    ),
    baseline="plain",
    grid={"optim.learning_rate": _RATES},
    budgets=(sweep.Budget("tokens"), sweep.Budget("parameters", 0.001)),
    smallest=0.02,
    diverged_above=_NO_MODEL,
    kept=(_LOGIT, "telemetry/output_logit_norm"),
    findings=findings,
)
get_config = SWEEP.get_config
