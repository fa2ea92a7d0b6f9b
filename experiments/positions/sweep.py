"""Positions: within the length of training, and at two and four times of it."""

from experiments import small
from llm_jax.lab import analysis
from llm_jax.lab import sweep

_FACTORS = (1, 2, 4)


def base():
    # Room for the longest rows: tables have rows that training never sees.
    return small.decoder(max_length=_FACTORS[-1] * small.LENGTH)


def full_size(name):
    """Returns GPT-2 124M with a variant's positions."""
    return small.gpt2(positions=SWEEP.variant(name).changes["model.positions"])


def findings(table: analysis.Table) -> list[analysis.Finding]:
    """Holds each kind of position to what Press et al. 2022 and Kazemnejad et al. 2023 found beyond the length."""
    found = []
    for name, is_steady in (
        ("alibi", True),
        ("rope", False),
        ("sinusoidal", False),
        ("learned", False),
    ):
        cell = table.row(name).cell
        values = [cell.values(f"x{factor}") for factor in _FACTORS]
        growth = analysis.mean_of([values[-1][seed] - values[0][seed] for seed in values[0]])
        holds = growth < 0.02 if is_steady else growth > 0.1
        wanted = "does not grow" if is_steady else "grows"
        text = f"{name}: the loss at four times the length is {growth:+.3f} that at the length (paper: it {wanted})."
        found.append(analysis.Finding(text, bool(holds), f"{name} x4 {growth:+.2f}"))
    return found


SWEEP = sweep.Sweep(
    name="positions",
    claim="linear biases hold beyond the length of training, other positions do not",
    source="Press et al. 2022; Kazemnejad et al. 2023",
    base=base,
    variants=tuple(
        sweep.Variant(name, {"model.positions": name})
        for name in ("rope", "learned", "sinusoidal", "alibi", "none")
    ),
    baseline="rope",
    budgets=(sweep.Budget("tokens"), sweep.Budget("flops", 0.001)),
    seeds=5,
    smallest=0.01,
    evaluations={
        f"x{factor}": {
            "data.sequence_length": factor * small.LENGTH,
            "data.batch_size": 8 // factor,
        }
        for factor in _FACTORS
    },
    full_size=full_size,
    findings=findings,
)
get_config = SWEEP.get_config
