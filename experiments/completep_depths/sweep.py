"""Learning rates over depths, with maximal updates alone and with residual branches scaled by the depth."""

from experiments import small
from llm_jax.lab import analysis
from llm_jax.lab import optima
from llm_jax.lab import sweep

_WIDTH = 64
_DEPTHS = (2, 6, 18)
_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
_NAMES = ("mup", "completep")


def base():
    config = small.decoder(
        embed_dim=_WIDTH,
        mlp_dim=4 * _WIDTH,
        base_width=_WIDTH,
        base_depth=_DEPTHS[0],
        init_stddev=_WIDTH**-0.5,
        scan_layers=True,
    )
    config.train.update(num_steps=250, eval_every=125)
    config.optim.warmup_steps = 25
    return config


def _variant(parametrisation, depth):
    changes = {"model.parametrisation": parametrisation, "model.num_layers": depth}
    return sweep.Variant(f"{parametrisation}_{depth}", changes, group=f"depth {depth}")


def findings(table: analysis.Table) -> list[analysis.Finding]:
    """Holds the optimum's drift over depths to Dey et al. 2025, figure 1."""
    variants = {name: {depth: f"{name}_{depth}" for depth in _DEPTHS} for name in _NAMES}
    expected = {
        "mup": lambda power: power.high < 0,
        "completep": lambda power: abs(power.mean) < 0.2,
    }
    return optima.findings(table, variants, _RATES, "depth", expected)


SWEEP = sweep.Sweep(
    name="completep_depths",
    claim="with residual branches scaled by the depth the best learning rate does not move with it",
    source="Dey et al. 2025",
    base=base,
    variants=tuple(_variant(name, depth) for name in _NAMES for depth in _DEPTHS),
    baseline=f"mup_{_DEPTHS[0]}",
    grid={"optim.learning_rate": _RATES},
    budgets=(sweep.Budget("tokens"), sweep.Budget("parameters"), sweep.Budget("flops")),
    smallest=0.01,
    diverged_above=5.55,
    findings=findings,
)
get_config = SWEEP.get_config
