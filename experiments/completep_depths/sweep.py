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


def _best(table, parametrisation):
    names = {depth: f"{parametrisation}_{depth}" for depth in _DEPTHS}
    return optima.best_rates(table, names, _RATES)


def findings(table: analysis.Table) -> list[analysis.Finding]:
    """Holds the optimum's drift over depths to Dey et al. 2025, figure 1."""
    found, drifts = [], {}
    for name in _NAMES:
        best = _best(table, name)
        power = drifts[name] = optima.power_of_size(best)
        text = (
            f"{name}: best rates by depth {optima.shown(best)}; they go with the depth to the power {power.mean:+.2f}"
            f" [{power.low:+.2f}, {power.high:+.2f}]."
        )
        holds = power.high < 0 if name == "mup" else abs(power.mean) < 0.2
        found.append(analysis.Finding(text, bool(holds), f"{name} {power.mean:+.2f}"))
    rate = optima.nearest(_best(table, "completep")[_DEPTHS[0]], _RATES)
    deepest = [f"{name}_{_DEPTHS[-1]}" for name in ("completep", "mup")]
    cells = tuple(table.cell(name, learning_rate=rate) for name in deepest)
    (one,) = table.contrasts([cells])
    text = (
        f"at the rate that is best at the base, {rate:g}, the deepest model with completep against mup:"
        f" {one.difference.mean:+.4f}, {one.verdict}."
    )
    holds = {"better": True, "worse": False}.get(one.verdict.partition(",")[0])
    found.append(analysis.Finding(text, holds, f"transferred {one.difference.mean:+.3f}"))
    return found


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
