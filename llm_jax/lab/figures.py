"""The figures of a report, as PNG and PDF: learning curves with bands, quality against cost, values over an axis."""

from collections.abc import Mapping
import math
import pathlib
from typing import Any

import matplotlib.figure
import numpy as np

from llm_jax.lab import analysis

_FORMATS = ("png", "pdf")
# PDFs would name the day they were drawn.
_METADATA = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None}}


def save(figure: matplotlib.figure.Figure, folder: pathlib.Path, name: str) -> str:
    """Writes a figure in each format; returns the name of the PNG."""
    for extension in _FORMATS:
        metadata = _METADATA[extension]
        figure.savefig(folder / f"{name}.{extension}", dpi=110, metadata=metadata)
    return f"{name}.png"


def curves(table: analysis.Table, metric: str) -> matplotlib.figure.Figure:
    """Draws the mean of each row's learning curve, and the range of its seeds."""
    figure = matplotlib.figure.Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in table.rows:
        drawn = row.cell.curve(metric)
        if not drawn:
            continue
        steps, means = np.array(drawn).T
        (line,) = axes.plot(steps, means, label=label_of(row), linewidth=1.2)
        low, high = _band(row.cell, metric, steps)
        axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    finite = [m for row in table.rows for _, m in row.cell.curve(metric)[-3:]]
    if finite:
        floor, ceiling = min(finite), max(finite)
        axes.set_ylim(floor - 0.05 * abs(floor), ceiling + 0.35 * (abs(ceiling) + 1e-9))
    axes.set(xlabel="step", ylabel=metric)
    axes.legend(fontsize=6, ncols=2)
    return figure


def _band(cell: analysis.Cell, metric: str, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = cell.points(metric)
    return tuple(np.array([pick(found[step]) for step in steps]) for pick in (min, max))


def pareto(
    table: analysis.Table, costs: Mapping[str, Mapping[str, Any]], metric: str
) -> matplotlib.figure.Figure | None:
    """Draws each row's metric over its modelled step and its HBM; None where nothing was compiled."""
    found = [
        (row, costs[row.variant])
        for row in table.rows
        if row.value is not None and row.variant in costs and "refusal" not in costs[row.variant]
    ]
    if not found:
        return None
    figure = matplotlib.figure.Figure(figsize=(8.0, 3.6), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("milliseconds", "GiB"),
        ("modelled full-size step, ms", "HBM of the full size, GiB"),
        strict=True,
    ):
        for row, cost in found:
            half = row.value.high - row.value.mean
            error = 0.0 if math.isnan(half) else half
            axes.errorbar(cost[key], row.value.mean, yerr=error, fmt="o", markersize=4, capsize=2)
            axes.annotate(
                label_of(row),
                (cost[key], row.value.mean),
                fontsize=6,
                xytext=(3, 3),
                textcoords="offset points",
            )
        front = _front([(cost[key], row.value.mean) for row, cost in found], table.sweep)
        axes.plot(*zip(*front), color="grey", linewidth=0.8, linestyle="--", zorder=0)
        axes.set(xlabel=label, ylabel=metric)
    return figure


def _front(points: list[tuple[float, float]], sweep: Any) -> list[tuple[float, float]]:
    """Returns the points that no other one beats in both."""
    sign = 1.0 if sweep.is_less_better else -1.0
    front, best = [], math.inf
    for cost, value in sorted(points):
        if sign * value < best:
            best = sign * value
            front.append((cost, value))
    return front


def over_axis(
    table: analysis.Table, path: str, evaluation: str = "", log: bool = True
) -> matplotlib.figure.Figure:
    """Draws each variant's metric over an axis of the grid, with a point for each seed; divergence as crosses."""
    figure = matplotlib.figure.Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    values = [value for cell in table.cells.values() for value in cell.values(evaluation).values()]
    top = max(values) if values else 1.0
    for variant in table.sweep.variants:
        of_variant = sorted(
            (dict(point)[path], cell)
            for (name, point), cell in table.cells.items()
            if name == variant.name
        )
        means = [
            (x, np.mean(list(c.values(evaluation).values()))) for x, c in of_variant if c.values()
        ]
        (line,) = axes.plot(*zip(*means), label=variant.name, linewidth=1.2) if means else (None,)
        colour = line.get_color() if line else None
        for x, cell in of_variant:
            own = list(cell.values(evaluation).values())
            axes.plot([x] * len(own), own, "o", markersize=2.5, color=colour)
            if cell.diverged:
                axes.plot(x, top, "x", markersize=6, color=colour)
    if log:
        axes.set_xscale("log")
    axes.set(xlabel=path, ylabel=evaluation or table.sweep.metric)
    axes.legend(fontsize=7)
    return figure


def label_of(row: analysis.Row) -> str:
    """Returns a row's variant and its point, short."""
    tuned = {path for path, _ in row.tuned}
    settings = [
        f"{path.rpartition('.')[2]}={value}" for path, value in row.cell.point if path not in tuned
    ]
    return ", ".join([row.variant, *settings])
