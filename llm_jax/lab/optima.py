"""Where optima lie as models grow: the best learning rate of each size, and how it goes with the size."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np

from llm_jax.lab import analysis
from llm_jax.lab import statistics

_AXIS = "learning_rate"


def best_rates(
    table: analysis.Table, names: Mapping[int, str], rates: Sequence[float]
) -> dict[int, list[float]]:
    """Returns for each size the best learning rates, by seed, as logarithms to the base 2.

    Args:
      table: of runs at all rates; those that diverged are infinitely bad.
      names: of the variants, by size.
      rates: the values of the axis.
    """
    found = {}
    for size, name in names.items():
        cells = [table.cell(name, **{_AXIS: rate}).values() for rate in rates]
        found[size] = []
        for seed in range(table.sweep.seeds):
            losses = np.array([values[seed] if seed in values else np.inf for values in cells])
            found[size].append(vertex(np.log2(rates), losses))
    return found


def vertex(x: np.ndarray, losses: np.ndarray) -> float:
    """Returns where the parabola through the lowest point and its neighbours is lowest; at an edge the edge."""
    place = int(np.argmin(losses))
    around = slice(place - 1, place + 2)
    if place in (0, len(x) - 1) or not np.all(np.isfinite(losses[around])):
        return float(x[place])
    a, b, _ = np.polyfit(x[around], losses[around], 2)
    return float(-b / (2 * a)) if a > 0 else float(x[place])


def power_of_size(best: Mapping[int, Sequence[float]]) -> statistics.Interval:
    """Returns the power of the size that the best rate goes with, over seeds."""
    sizes = sorted(best)
    return statistics.interval(
        [
            statistics.fit_line(np.log2(sizes), [best[size][seed] for size in sizes])[0]
            for seed in range(len(best[sizes[0]]))
        ]
    )


def shown(best: Mapping[int, Sequence[float]]) -> str:
    """Returns the best rates in words: `32: 4.1e-03, 64: 3.8e-03`."""
    return ", ".join(f"{size}: {2 ** np.mean(best[size]):.1e}" for size in sorted(best))


def nearest(best: Sequence[float], rates: Sequence[float]) -> float:
    """Returns the rate of the axis that lies nearest to the best one of a size, on average over seeds."""
    return min(rates, key=lambda rate: abs(np.log2(rate) - np.mean(best)))


def findings(
    table: analysis.Table,
    variants: Mapping[str, Mapping[int, str]],
    rates: Sequence[float],
    size: str,
    expected: Mapping[str, Callable[[statistics.Interval], bool]],
) -> list[analysis.Finding]:
    """Returns how best rates go with the size, and whether the one of the smallest model serves the largest.

    Args:
      table: of runs at all rates.
      variants: by parametrisation and size; the last parametrisation is the one that is to keep its rates.
      rates: the values of the axis.
      size: what grows: "width".
      expected: for each parametrisation, whether a power of the size is what its source says.
    """
    found = []
    best = {name: best_rates(table, of_size, rates) for name, of_size in variants.items()}
    for name, of_size in best.items():
        power = power_of_size(of_size)
        text = (
            f"{name}: best rates by {size} {shown(of_size)}; they go with the {size} to the power {power.mean:+.2f}"
            f" [{power.low:+.2f}, {power.high:+.2f}]."
        )
        holds = bool(expected[name](power))
        found.append(analysis.Finding(text, holds, f"{name} {power.mean:+.2f}"))
    other, keeping = variants
    smallest, largest = min(variants[keeping]), max(variants[keeping])
    rate = nearest(best[keeping][smallest], rates)
    cells = [table.cell(variants[name][largest], learning_rate=rate) for name in (keeping, other)]
    (one,) = table.contrasts([tuple(cells)])
    text = (
        f"at the rate that is best at the base, {rate:g}, the model of the largest {size} with {keeping} against {other}:"
        f" {one.difference.mean:+.4f}, {one.verdict}."
    )
    holds = one.bears_out("better")
    return [*found, analysis.Finding(text, holds, f"transferred {one.difference.mean:+.3f}")]
