"""Learning rates over widths, with the standard parametrisation and with maximal updates."""

import numpy as np

from experiments import small
from llm_jax.lab import analysis
from llm_jax.lab import statistics
from llm_jax.lab import sweep

_WIDTHS = (32, 64, 128, 256)
_HEAD = 16  # elements of a head: wider models have more of them
# By powers of two: wide enough that optima lie inside, for the narrowest standard model and for the widest.
_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def base():
    config = small.decoder(base_width=_WIDTHS[0], base_depth=4)
    config.train.update(num_steps=400, eval_every=100, eval_steps=40)
    config.optim.warmup_steps = 40
    return config


def _variant(parametrisation, width):
    changes = {
        "model.parametrisation": parametrisation,
        "model.embed_dim": width,
        "model.mlp_dim": 4 * width,
        "model.num_heads": width // _HEAD,
        # Of matrices at the base: the inverse root of its width.
        "model.init_stddev": _WIDTHS[0] ** -0.5 if parametrisation == "mup" else width**-0.5,
    }
    return sweep.Variant(f"{parametrisation}_{width}", changes, group=f"width {width}")


def best_rates(table: analysis.Table, parametrisation: str) -> dict[int, list[float]]:
    """Returns the best learning rate of each width, by seed: the vertex of a parabola through the three best."""
    found = {}
    for width in _WIDTHS:
        cells = [
            table.cell(f"{parametrisation}_{width}", learning_rate=rate).values() for rate in _RATES
        ]
        found[width] = []
        for seed in range(table.sweep.seeds):
            losses = np.array([values[seed] if seed in values else np.inf for values in cells])
            found[width].append(_vertex(np.log2(_RATES), losses))
    return found


def _vertex(x: np.ndarray, losses: np.ndarray) -> float:
    """Returns where the parabola through the lowest point and its neighbours is lowest."""
    place = int(np.argmin(losses))
    around = slice(place - 1, place + 2)
    if place in (0, len(x) - 1) or not np.all(np.isfinite(losses[around])):
        return float(x[place])
    a, b, _ = np.polyfit(x[around], losses[around], 2)
    return float(-b / (2 * a)) if a > 0 else float(x[place])


def findings(table: analysis.Table) -> list[analysis.Finding]:
    """Holds the optimum's drift over widths to Yang et al. 2022, figure 1."""
    found, slopes = [], {}
    for name in ("standard", "mup"):
        rates = best_rates(table, name)
        of_seeds = [
            statistics.fit_line(np.log2(_WIDTHS), [rates[width][seed] for width in _WIDTHS])[0]
            for seed in range(table.sweep.seeds)
        ]
        slopes[name] = statistics.interval(of_seeds)
        shown = ", ".join(f"{width}: {2 ** np.mean(rates[width]):.1e}" for width in _WIDTHS)
        slope = slopes[name]
        text = (
            f"{name}: best rates by width {shown}; they go with the width to the power {slope.mean:+.2f}"
            f" [{slope.low:+.2f}, {slope.high:+.2f}]."
        )
        holds = slope.high < -0.25 if name == "standard" else abs(slope.mean) < 0.25
        found.append(analysis.Finding(text, bool(holds), f"{name} {slope.mean:+.2f}"))
    widest = [f"{name}_{_WIDTHS[-1]}" for name in ("mup", "standard")]
    # With the rate that is best at the base, as one would transfer it.
    base_rate = min(
        _RATES, key=lambda rate: abs(np.log2(rate) - np.mean(best_rates(table, "mup")[32]))
    )
    cells = [table.cell(name, learning_rate=base_rate) for name in widest]
    (one,) = table.contrasts([tuple(cells)])
    text = (
        f"at the rate that is best at the base, {base_rate:g}, the widest model with mup against standard:"
        f" {one.difference.mean:+.4f}, {one.verdict}."
    )
    holds = {"better": True, "worse": False}.get(one.verdict.partition(",")[0])
    found.append(analysis.Finding(text, holds, f"transferred {one.difference.mean:+.3f}"))
    return found


SWEEP = sweep.Sweep(
    name="mup_widths",
    claim="with maximal updates the best learning rate does not move with the width",
    source="Yang et al. 2022",
    base=base,
    variants=tuple(
        _variant(parametrisation, width)
        for parametrisation in ("standard", "mup")
        for width in _WIDTHS
    ),
    baseline="standard_32",
    grid={"optim.learning_rate": _RATES},
    budgets=(sweep.Budget("tokens"), sweep.Budget("parameters"), sweep.Budget("flops")),
    smallest=0.01,
    diverged_above=5.55,
    findings=findings,
)
get_config = SWEEP.get_config
