"""Activations of the feed-forward part, at equal parameters."""

from experiments import small
from llm_jax.lab import analysis
from llm_jax.lab import sweep

# Three matrices instead of two: two thirds of the width.
_GATED = {"model.is_gated": True, "model.mlp_dim": 341}
_RATES = (1e-3, 2e-3, 4e-3)


def _variant(name, activation, is_gated=False):
    return sweep.Variant(name, {"model.activation": activation} | (_GATED if is_gated else {}))


def full_size(name):
    """Returns GPT-2 124M with a variant's activation."""
    changes = {path.partition(".")[2]: v for path, v in SWEEP.variant(name).changes.items()}
    changes["mlp_dim"] = 2048 if "is_gated" in changes else 3072
    return small.gpt2(**changes)


# What is compared, and by how much the first was better in the paper, nats a token.
_CLAIMS = (("geglu", "gelu", 0.041), ("swiglu", "silu", 0.050), ("relu_squared", "relu", None))


def findings(table: analysis.Table) -> list[analysis.Finding]:
    """Holds gated variants to their plain ones (Shazeer 2020, table 1), and squares to ReLU (So et al. 2021)."""
    pairs = [(table.row(one).cell, table.row(other).cell) for one, other, _ in _CLAIMS]
    found = []
    for (one, other, theirs), contrast in zip(_CLAIMS, table.contrasts(pairs), strict=True):
        gain = contrast.difference.mean
        paper = "kept as a gain" if theirs is None else f"{-theirs:+.3f} nats a token"
        text = (
            f"{one} against {other}: {gain:+.4f} nats a byte, {contrast.verdict} (paper: {paper})."
        )
        holds = contrast.bears_out("better")
        found.append(analysis.Finding(text, holds, f"{one} {gain:+.3f}"))
    return found


SWEEP = sweep.Sweep(
    name="activations",
    claim="gated activations beat plain ones of as many parameters",
    source="Shazeer 2020; So et al. 2021",
    base=small.decoder,
    variants=(
        _variant("gelu", "gelu"),
        _variant("relu", "relu"),
        _variant("relu_squared", "relu_squared"),
        _variant("silu", "silu"),
        _variant("geglu", "gelu", is_gated=True),
        _variant("swiglu", "silu", is_gated=True),
    ),
    baseline="gelu",
    grid={"optim.learning_rate": _RATES},
    tuned=("optim.learning_rate",),
    seeds=5,
    tuning_seeds=1,
    budgets=(
        sweep.Budget("tokens"),
        sweep.Budget("parameters", 0.005),
        sweep.Budget("flops", 0.005),
    ),
    smallest=0.005,
    full_size=full_size,
    findings=findings,
)
get_config = SWEEP.get_config
