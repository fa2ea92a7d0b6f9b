"""Optimisers, each at its best learning rate, and the baseline as one finds it badly tuned."""

from experiments import small
from llm_jax.lab import analysis
from llm_jax.lab import sweep

_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
_NAMES = ("adamw", "lion", "adafactor", "muon", "soap", "schedule_free")
# Signs move every weight by the whole rate: theirs are lower.
_OWN_RATES = {"lion": (1.5e-4, 3e-4, 6e-4, 1.2e-3)}
_BAD = "adamw_badly_tuned"


def _variant(name):
    changes = {"optim.name": name}
    if name == "lion":
        # Their advice: the decay as much higher as the rate is lower.
        changes |= {"optim.b2": 0.98, "optim.weight_decay": 0.5}
    if name == "schedule_free":
        changes |= {"optim.schedule": "constant"}
    own = {"optim.learning_rate": _OWN_RATES[name]} if name in _OWN_RATES else {}
    return sweep.Variant(name, changes, grid=own)


def steps_to(table: analysis.Table, name: str, loss: float) -> float | None:
    """Returns the steps after which the mean curve of an optimiser is at a loss; None where it never is."""
    last = None
    for step, value in table.row(name).cell.curve(table.sweep.metric):
        if value <= loss:
            if last is None:
                return step
            share = (last[1] - loss) / (last[1] - value)
            return last[0] + share * (step - last[0])
        last = step, value
    return None


def findings(table: analysis.Table) -> list[analysis.Finding]:
    """Holds optimisers to what their papers say of AdamW, and tells steps to its loss."""
    wanted = table.row("adamw").value.mean
    last = table.sweep.get_config().train.num_steps
    found = []
    for name, claim in (
        ("muon", "better"),
        ("soap", "better"),
        ("schedule_free", "no worse"),
        ("lion", "no worse"),
        ("adafactor", "no worse"),
    ):
        comparison = table.row(name).comparison
        steps = steps_to(table, name, wanted)
        reached = (
            "does not reach it" if steps is None else f"is there after {steps:.0f} of {last} steps"
        )
        text = (
            f"{name} against AdamW: {comparison.difference.mean:+.4f}, {comparison.verdict}; it {reached}"
            f" (papers: {claim})."
        )
        holds = comparison.bears_out(claim)
        found.append(analysis.Finding(text, holds, f"{name} {comparison.difference.mean:+.3f}"))
    bad = table.row(_BAD)
    gains = [
        name for name in _NAMES if name != "adamw" and table.row(name).value.mean < bad.value.mean
    ]
    text = (
        f"AdamW as defaults have it is {bad.comparison.difference.mean:+.4f} from the tuned one: beside it"
        f" {', '.join(gains) or 'no optimiser'} would have looked better."
    )
    found.append(analysis.Finding(text, bool(bad.comparison.difference.mean > 0), "untuned"))
    return found


SWEEP = sweep.Sweep(
    name="optimisers",
    claim="Muon and SOAP beat a tuned AdamW, Lion, Adafactor and schedule-free do as well",
    source="Jordan et al. 2024; Vyas et al. 2024; Defazio et al. 2024; Zhao et al. 2024",
    base=small.decoder,
    variants=(
        *map(_variant, _NAMES),
        # Defaults of PyTorch's AdamW; a rate that is usual for larger models.
        sweep.Variant(_BAD, {"optim.b2": 0.999}, grid={"optim.learning_rate": (2.5e-4,)}),
    ),
    baseline="adamw",
    grid={"optim.learning_rate": _RATES},
    tuned=("optim.learning_rate",),
    seeds=5,
    tuning_seeds=1,
    budgets=(sweep.Budget("tokens"), sweep.Budget("parameters"), sweep.Budget("flops")),
    smallest=0.01,
    findings=findings,
)
get_config = SWEEP.get_config
