"""Laws of scale: loss by parameters and tokens, and the best size for a budget, with bootstrap intervals.

Two of the three approaches of Hoffmann et al. 2022 (Training Compute-Optimal Large Language Models): the lowest point of
each budget's losses over sizes (section 3.2), and one function of parameters and tokens (section 3.3).
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools

import numpy as np
import scipy.optimize

from llm_jax import errors

_HUBER = 1e-3  # of residuals of the logarithm of the loss: theirs
_SCALE = 1e6
# Where fits begin: their grid of starts, thinned.
_STARTS = {
    "log_e": (-1.0, 0.0, 1.0),
    "log_a": (0.0, 5.0, 10.0),
    "alpha": (0.2, 0.5, 1.0),
    "log_b": (0.0, 5.0, 10.0),
    "beta": (0.2, 0.5, 1.0),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """A run: its parameters, the tokens it learned from, its loss in nats, and the training flops it was given."""

    parameters: float
    tokens: float
    loss: float
    budget: float = 0.0


@dataclasses.dataclass(frozen=True)
class Law:
    """loss = floor + a / parameters**alpha + b / tokens**beta (equation 2)."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Returns the loss of a model of so many parameters after so many tokens, nats."""
        return self.floor + self.a / parameters**self.alpha + self.b / tokens**self.beta

    @property
    def size_exponent(self) -> float:
        """What the best number of parameters goes with, as a power of compute (equation 4)."""
        return self.beta / (self.alpha + self.beta)


@dataclasses.dataclass(frozen=True)
class Minimum:
    """The lowest point of a budget's losses over sizes: parameters, loss, and whether sizes lie on both sides."""

    parameters: float
    loss: float
    is_inside: bool


def fit(points: Sequence[Point]) -> Law:
    """Returns the law that fits best, by Huber's loss of the logarithm of the loss.

    Raises:
      errors.UserError: there are fewer than six points: the law has five numbers.
    """
    if len(points) < 6:
        raise errors.UserError(f"{len(points)} points do not tell a law of five numbers: give more")
    starts = [np.array(start) for start in itertools.product(*_STARTS.values())]
    # The starts that are nearest, as most of them end in the same place.
    logs = _logs(points)
    nearest = sorted(starts, key=lambda start: _residual(start, *logs)[0])[:8]
    return _law(min((_descend(start, *logs) for start in nearest), key=lambda found: found.fun).x)


def refit(points: Sequence[Point], law: Law) -> Law:
    """Returns the law of other points that lies nearest to one: of a resample."""
    start = np.array(
        [np.log(law.floor), np.log(law.a), law.alpha, np.log(law.b), law.beta], np.float64
    )
    return _law(_descend(start, *_logs(points)).x)


def _logs(points: Sequence[Point]) -> tuple[np.ndarray, ...]:
    columns = [(one.parameters, one.tokens, one.loss) for one in points]
    return tuple(np.log(np.array(columns, np.float64).T))


def _descend(start: np.ndarray, *logs: np.ndarray) -> scipy.optimize.OptimizeResult:
    return scipy.optimize.minimize(_residual, start, args=logs, method="L-BFGS-B", jac=True)


def _residual(
    law: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray
) -> tuple[float, np.ndarray]:
    """Returns what is minimised, and its gradient."""
    log_e, log_a, alpha, log_b, beta = law
    terms = np.array(
        [np.full_like(log_n, log_e), log_a - alpha * log_n, log_b - beta * log_d], np.float64
    )
    log_sum = np.logaddexp.reduce(terms, axis=0)
    error = log_sum - log_loss
    size, bounded = np.abs(error), np.clip(error, -_HUBER, _HUBER)
    value = np.sum(np.where(size < _HUBER, error**2 / 2, _HUBER * (size - _HUBER / 2)))
    e, a, b = bounded * np.exp(terms - log_sum)
    gradient = [np.sum(x) for x in (e, a, -a * log_n, b, -b * log_d)]
    # Sums are small numbers, which the stopping rule would take for nothing.
    return float(value * _SCALE), np.array(gradient) * _SCALE


def _law(found: np.ndarray) -> Law:
    log_e, log_a, alpha, log_b, beta = found
    return Law(*(float(x) for x in (np.exp(log_e), np.exp(log_a), alpha, np.exp(log_b), beta)))


def minima(points: Sequence[Point]) -> dict[float, Minimum]:
    """Returns for each budget the lowest point of the parabola through losses over the logarithm of the size.

    Raises:
      errors.UserError: a budget has fewer than three sizes.
    """
    found = {}
    for budget in sorted({one.budget for one in points}):
        own = [one for one in points if one.budget == budget]
        sizes = np.log([one.parameters for one in own])
        if len(set(sizes)) < 3:
            raise errors.UserError(
                f"{len(set(sizes))} sizes do not tell the best one for {budget:g} flops: give three"
            )
        a, b, c = np.polyfit(sizes, [one.loss for one in own], 2)
        vertex, lowest = (-b / (2 * a), c - b**2 / (4 * a)) if a > 0 else (np.nan, np.nan)
        is_inside = bool(sizes.min() < vertex < sizes.max())
        found[budget] = Minimum(float(np.exp(vertex)), float(lowest), is_inside)
    return found


def size_exponent(points: Sequence[Point]) -> float:
    """Returns the power of compute that the best sizes go with, by `minima`; NaN where a budget has none."""
    found = minima(points)
    logs = np.log([[budget, one.parameters] for budget, one in found.items()])
    return float(np.polyfit(*logs.T, 1)[0]) if np.all(np.isfinite(logs)) else np.nan


def bootstrap(
    by_seed: Mapping[int, Sequence[Point]],
    statistic: Callable[[Sequence[Point]], float],
    resamples: int = 200,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Returns a percentile interval of a statistic, over resamples of each place's seeds.

    Places, sizes by budgets, are what was chosen, and stay; of each the seeds are drawn anew. Draws whose statistic is
    not finite are left out.

    Args:
      by_seed: for each seed the points of all places, in one order.
      statistic: of the points of all places.
      resamples: how many.
      confidence: of the interval.
    """
    seeds, rng = sorted(by_seed), np.random.default_rng(0)
    places = len(by_seed[seeds[0]])
    found = []
    for _ in range(resamples):
        drawn = rng.choice(seeds, (places, len(seeds)))
        picked = [by_seed[seed][place] for place in range(places) for seed in drawn[place]]
        found.append(statistic(picked))
    finite = [value for value in found if np.isfinite(value)]
    if not finite:
        return np.nan, np.nan
    tail = 50 * (1 - confidence)
    low, high = np.percentile(finite, [tail, 100 - tail])
    return float(low), float(high)
