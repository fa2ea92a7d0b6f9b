"""Results of a sweep to the rows of its table, and what is no fair comparison.

A row is a variant at a point of the axes that are not tuned; of a tuned axis it has the value whose mean is best, of
runs that did not diverge, or of the seeds that choose where not all do. It stands beside the baseline's row at the same
point, which has a best value of its own; of another group of variants than the baseline's, beside the first of its group.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from llm_jax import errors
from llm_jax.lab import results as results_lib
from llm_jax.lab import statistics
from llm_jax.lab import sweep as sweep_lib


@dataclasses.dataclass(frozen=True)
class Cell:
    """The runs of a variant at one point of the whole grid.

    Attributes:
      variant, point: which.
      by_seed: results, by seed.
    """

    variant: str
    point: sweep_lib.Point
    by_seed: Mapping[int, Mapping[str, Any]]

    @property
    def diverged(self) -> list[int]:
        """Seeds whose run diverged."""
        return [seed for seed, row in self.by_seed.items() if row["value"] is None]

    def values(self, name: str = "") -> dict[int, float]:
        """Returns the metric, or that of an evaluation, by seed, of runs that did not diverge."""
        return {
            seed: row["evaluations"][name] if name else row["value"]
            for seed, row in self.by_seed.items()
            if row["value"] is not None
        }

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Returns the mean over seeds of a metric's rows: (step, value); see `points`."""
        found = self.points(name)
        return [(step, float(np.mean(values))) for step, values in sorted(found.items())]

    def ends(self, name: str) -> list[float]:
        """Returns for each seed that has it the mean of a metric's last quarter of rows."""
        found = []
        for row in self.by_seed.values():
            values = [value for _, value in row["curves"][name]] if name in row["curves"] else []
            if values:
                found.append(float(np.mean(values[-max(1, len(values) // 4) :])))
        return found

    def points(self, name: str) -> dict[float, list[float]]:
        """Returns a metric's values of all seeds by their step; of one with a value a layer the largest."""
        found: dict[float, list[float]] = {}
        for row in self.by_seed.values():
            for step, value in row["curves"][name] if name in row["curves"] else ():
                values = value if isinstance(value, list) else [value]
                # What is not finite is kept as a string.
                if all(isinstance(one, (int, float)) for one in values):
                    found.setdefault(step, []).append(max(values))
        return found


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      cell: the runs.
      tuned: the best value of each tuned axis.
      value: mean and interval of the metric; None where all diverged.
      comparison: with the baseline; None for the baseline, and where either has no two seeds in common.
      speedup: see `statistics.speedup`; NaN where curves do not tell.
      usage: tokens, flops and parameters of a run.
    """

    cell: Cell
    tuned: sweep_lib.Point
    value: statistics.Interval | None
    comparison: statistics.Comparison | None
    speedup: float
    usage: Mapping[str, float]

    @property
    def variant(self) -> str:
        return self.cell.variant


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the data show of a claim.

    Attributes:
      text: in words, with figures.
      holds: whether it came out as the source has it; None: it cannot be told.
      effect: the figure of the ledger.
    """

    text: str
    holds: bool | None
    effect: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """All rows of a sweep.

    Attributes:
      sweep: which.
      cells: by variant and point of the grid.
      rows: in the order of variants, at each point of the axes that are not tuned.
    """

    sweep: sweep_lib.Sweep
    cells: Mapping[tuple[str, sweep_lib.Point], Cell]
    rows: tuple[Row, ...]

    def row(self, variant: str, **axes: Any) -> Row:
        """Returns the row of a variant; `axes` by the last part of their paths, where rows have some."""
        for row in self.rows:
            point = {path.rpartition(".")[2]: value for path, value in row.cell.point}
            if row.variant == variant and all(point[name] == v for name, v in axes.items()):
                return row
        raise KeyError(f"{variant} {axes}")

    def cell(self, variant: str, **axes: Any) -> Cell:
        """Returns the runs of a variant at a point of the whole grid, as `row`."""
        for (name, point), cell in self.cells.items():
            named = {path.rpartition(".")[2]: value for path, value in point}
            if name == variant and all(named[axis] == value for axis, value in axes.items()):
                return cell
        raise KeyError(f"{variant} {axes}")

    def contrasts(
        self, pairs: Sequence[tuple[Cell, Cell]], evaluation: str = ""
    ) -> list[statistics.Comparison]:
        """Returns comparisons of runs that a finding asks for, corrected for their number.

        Args:
          pairs: what stands beside what.
          evaluation: whose loss is compared, instead of the metric.
        """
        values = []
        for cell, other in pairs:
            own, theirs = cell.values(evaluation), other.values(evaluation)
            seeds = sorted(set(own) & set(theirs))
            values.append(([own[s] for s in seeds], [theirs[s] for s in seeds]))
        how = {"is_less_better": self.sweep.is_less_better, "smallest": self.sweep.smallest}
        return statistics.compare(values, **how)

    def findings(self) -> list[Finding]:
        """Returns what the sweep's own question finds."""
        return [] if self.sweep.findings is None else self.sweep.findings(self)

    @property
    def num_seeds(self) -> int:
        """Seeds of each variant."""
        return min(len(row.cell.by_seed) for row in self.rows)


def tabulate(sweep: sweep_lib.Sweep, results: results_lib.Results) -> Table:
    """Returns the table of a sweep.

    Raises:
      errors.UserError: runs are missing, of other settings than those of now, of other tokens than each other where
        these are compared as equals, or without one of the metrics.
    """
    cells = _cells(sweep, results, [variant.name for variant in sweep.variants])
    _check_seeds(sweep, cells.values(), set(sweep.choosing_seeds))
    used = sweep.check_budgets()
    chosen = _chosen(sweep, cells)
    _check_seeds(sweep, chosen.values(), set(range(sweep.seeds)))
    return Table(sweep, cells, tuple(_rows(sweep, chosen, used)))


def further_runs(
    sweep: sweep_lib.Sweep, results: results_lib.Results, only: Sequence[str] = ()
) -> list[sweep_lib.Run]:
    """Returns the runs of the seeds that do not choose: with the values of tuned axes that the others chose.

    Args:
      sweep: which.
      results: in which those of `sweep.runs(only)` are.
      only: names of variants; none: all.

    Raises:
      errors.UserError: runs that choose are missing.
    """
    seeds = range(len(sweep.choosing_seeds), sweep.seeds)
    if not seeds:
        return []
    names = only or [variant.name for variant in sweep.variants]
    cells = _cells(sweep, results, names)
    _check_seeds(sweep, cells.values(), set(sweep.choosing_seeds))
    return [
        sweep_lib.Run(cell.variant, cell.point, seed)
        for seed in seeds
        for cell in _chosen(sweep, cells).values()
    ]


def _cells(
    sweep: sweep_lib.Sweep, results: results_lib.Results, names: Sequence[str]
) -> dict[tuple[str, sweep_lib.Point], Cell]:
    return {
        (name, point): Cell(name, point, _by_seed(sweep, results, name, point))
        for name in names
        for point in sweep.points(name)
    }


def _chosen(
    sweep: sweep_lib.Sweep, cells: Mapping[tuple[str, sweep_lib.Point], Cell]
) -> dict[tuple[str, sweep_lib.Point], Cell]:
    """Returns for each variant, and point of the axes that are not tuned, the best of its cells."""
    chosen: dict[tuple[str, sweep_lib.Point], Cell] = {}
    for (name, point), cell in cells.items():
        place = tuple((path, value) for path, value in point if path not in sweep.tuned)
        if (name, place) not in chosen or _is_better(sweep, cell, chosen[name, place]):
            chosen[name, place] = cell
    return chosen


def _by_seed(
    sweep: sweep_lib.Sweep, results: results_lib.Results, variant: str, point: sweep_lib.Point
) -> dict[int, Mapping[str, Any]]:
    found = {}
    for seed in range(sweep.seeds):
        row = results.get(sweep_lib.Run(variant, point, seed))
        if row is None:
            continue
        value = row["value"]
        if value is not None and sweep.diverged_above is not None and value > sweep.diverged_above:
            row = row | {"value": None}
        missing = [name for name in sweep.evaluations if name not in row["evaluations"]]
        if missing and row["value"] is not None:
            raise errors.UserError(
                f"{sweep.name}: run {row['run']} has no {missing[0]!r}, which others have: run it again"
            )
        found[seed] = row
    return found


def _check_seeds(sweep: sweep_lib.Sweep, cells: Iterable[Cell], wanted: set[int]) -> None:
    for cell in cells:
        missing = sorted(wanted - set(cell.by_seed))
        if missing:
            name = sweep_lib.Run(cell.variant, cell.point, missing[0]).name
            raise errors.UserError(
                f"{sweep.name}: run {name} is missing, or of other settings than now: run"
                f" python -m experiments.run {sweep.name}"
            )


def _is_better(sweep: sweep_lib.Sweep, cell: Cell, other: Cell) -> bool:
    """Returns whether a cell's runs are the better choice: fewer diverged, then by their mean, of the seeds that choose."""
    cell, other = (_of_seeds(one, sweep.choosing_seeds) for one in (cell, other))
    if len(cell.diverged) != len(other.diverged):
        return len(cell.diverged) < len(other.diverged)
    values, others = (list(one.values().values()) for one in (cell, other))
    if not values or not others:
        return bool(values) and not others
    is_less = np.mean(values) < np.mean(others)
    return is_less == sweep.is_less_better and np.mean(values) != np.mean(others)


def _of_seeds(cell: Cell, seeds: Sequence[int]) -> Cell:
    by_seed = {seed: row for seed, row in cell.by_seed.items() if seed in seeds}
    return dataclasses.replace(cell, by_seed=by_seed)


def _rows(
    sweep: sweep_lib.Sweep,
    chosen: Mapping[tuple[str, sweep_lib.Point], Cell],
    used: Mapping[str, Mapping[str, float]],
) -> list[Row]:
    compared, pairs = [], []
    for (name, place), cell in chosen.items():
        baseline = chosen[sweep.reference(name), place]
        own, theirs = cell.values(), baseline.values()
        seeds = sorted(set(own) & set(theirs))
        if name != baseline.variant and len(seeds) >= 1:
            compared.append((name, place))
            pairs.append(([own[s] for s in seeds], [theirs[s] for s in seeds]))
    comparisons = dict(
        zip(
            compared,
            statistics.compare(pairs, is_less_better=sweep.is_less_better, smallest=sweep.smallest),
            strict=True,
        )
    )
    rows = []
    for (name, place), cell in chosen.items():
        values = list(cell.values().values())
        rows.append(
            Row(
                cell,
                tuple((path, value) for path, value in cell.point if path in sweep.tuned),
                statistics.interval(values) if values else None,
                comparisons.get((name, place)),
                _speedup(sweep, cell, chosen[sweep.reference(name), place], used),
                used[name],
            )
        )
    return rows


def _speedup(
    sweep: sweep_lib.Sweep, cell: Cell, baseline: Cell, used: Mapping[str, Mapping[str, float]]
) -> float:
    """Returns the effective speed-up in training flops."""
    curves = [one.curve(sweep.metric) for one in (cell, baseline)]
    if cell.variant == baseline.variant or any(len(curve) < 2 for curve in curves):
        return math.nan
    if cell.diverged or baseline.diverged:
        return math.nan
    per_step = [
        used[one.variant]["flops"] / curve[-1][0] for one, curve in zip((cell, baseline), curves)
    ]
    ours, theirs = (
        [(step * scale, value) for step, value in curve]
        for scale, curve in zip(per_step, curves, strict=True)
    )
    return statistics.speedup(ours, theirs, sweep.is_less_better)


def mean_of(values: Sequence[float]) -> float:
    """Returns the mean; NaN of none."""
    return float(np.mean(values)) if len(values) else math.nan
