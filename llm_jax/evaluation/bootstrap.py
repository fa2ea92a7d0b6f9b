"""Confidence intervals by resampling examples (Efron 1979), and whether two systems differ (Koehn 2004)."""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses

import numpy as np

_SEED = 0
COUNT = 1000  # resamples
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score and its percentile interval of `LEVEL`."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def of_mean(values_N: np.ndarray, weights_N: np.ndarray | None = None) -> Estimate:
    """Returns the mean of what each example contributes, weighted where weights are given."""
    values_N = np.asarray(values_N, np.float64)
    weights_N = np.ones(len(values_N)) if weights_N is None else np.asarray(weights_N, np.float64)

    def score(counts_RN: np.ndarray) -> np.ndarray:
        return counts_RN @ (values_N * weights_N) / np.maximum(counts_RN @ weights_N, 1e-300)

    return of_counts(score, len(values_N))


def of_counts(score: Callable[[np.ndarray], np.ndarray], num_examples: int) -> Estimate:
    """Returns a score and its interval.

    Args:
      score: of samples, given how often each has each example, float64 [R, N]: returns [R].
      num_examples: N.

    Raises:
      ValueError: there are no examples.
    """
    if num_examples == 0:
        raise ValueError("there are no examples to score")
    value = float(score(np.ones((1, num_examples)))[0])
    found = np.concatenate([score(counts_RN) for counts_RN in samples(num_examples)])
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.quantile(found, [tail, 1.0 - tail])
    return Estimate(value, float(low), float(high))


def samples(num_examples: int) -> Iterator[np.ndarray]:
    """Yields how often samples have each example, float64 [R, N], a few samples at a time."""
    rng = np.random.default_rng(_SEED)
    step = max(1, min(COUNT, 2_000_000 // num_examples))
    for start in range(0, COUNT, step):
        rows = min(step, COUNT - start)
        drawn_RN = rng.integers(0, num_examples, (rows, num_examples))
        flat = drawn_RN + num_examples * np.arange(rows)[:, None]
        counts = np.bincount(flat.ravel(), minlength=rows * num_examples)
        yield counts.reshape(rows, num_examples).astype(np.float64)


def difference(first_N: np.ndarray, second_N: np.ndarray) -> tuple[Estimate, float]:
    """Returns the mean difference of two systems on the same examples, and a two-sided p-value.

    The p-value is the share of resamples of differences, moved to have no mean, that are as far from zero.

    Raises:
      ValueError: they are of other numbers of examples.
    """
    if len(first_N) != len(second_N):
        raise ValueError(f"{len(first_N)} and {len(second_N)} examples are not the same ones")
    differences_N = np.asarray(first_N, np.float64) - np.asarray(second_N, np.float64)
    mean = differences_N.mean()
    centred_N = differences_N - mean
    size = len(differences_N)
    found = np.concatenate([counts_RN @ centred_N / size for counts_RN in samples(size)])
    return of_mean(differences_N), float((1 + np.sum(np.abs(found) >= abs(mean))) / (1 + COUNT))
