"""Do two recipes differ, by how much, and how sure can one be? Paired over seeds.

Runs of one seed share the order of data, and their initialisation where shapes allow: what is compared is their
difference, seed by seed, by Student's t. P-values of several comparisons are corrected by Holm 1979.
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

CONFIDENCE = 0.95
FEWEST_SEEDS = (
    3  # below, no verdict: two differences have a t distribution of one degree of freedom
)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval; NaN limits of a single value."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.4f} (one seed)"
        return f"{self.mean:.4f} ± {self.high - self.mean:.4f}"


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Returns the mean of values with Student's interval.

    Raises:
      ValueError: there are none, or one is not finite.
    """
    from scipy import stats

    values_N = np.asarray(values, np.float64)
    if not len(values_N) or not np.all(np.isfinite(values_N)):
        raise ValueError(f"no finite values to average: {values_N.tolist()}")
    mean = float(values_N.mean())
    if len(values_N) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    error = float(stats.sem(values_N))
    if error == 0.0:
        return Interval(mean, mean, mean, len(values_N))
    low, high = stats.t.interval(confidence, len(values_N) - 1, mean, error)
    return Interval(mean, float(low), float(high), len(values_N))


def paired_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the two-sided p-value of Student's paired test; NaN of fewer than two pairs.

    Pairs that are all equal have a p-value of 1.

    Raises:
      ValueError: they are of other numbers of values.
    """
    from scipy import stats

    first_N, second_N = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if len(first_N) != len(second_N):
        raise ValueError(f"{len(first_N)} and {len(second_N)} values are no pairs")
    differences_N = first_N - second_N
    if len(differences_N) < 2:
        return math.nan
    if np.all(differences_N == differences_N[0]):  # the test divides by their spread
        return 1.0 if differences_N[0] == 0.0 else 0.0
    return float(stats.ttest_rel(first_N, second_N).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number (Holm 1979); those that are NaN are none of it."""
    found = list(map(float, p_values))
    order = sorted(
        (i for i in range(len(found)) if not math.isnan(found[i])), key=found.__getitem__
    )
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, found[index] * (len(order) - rank)))
        found[index] = largest
    return found


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A variant beside the baseline.

    Attributes:
      difference: variant less baseline, over pairs of seeds.
      p_value: of a single comparison.
      adjusted: corrected for all comparisons of the table.
      verdict: in words.
    """

    difference: Interval
    p_value: float
    adjusted: float
    verdict: str

    def bears_out(self, claim: str) -> bool | None:
        """Returns whether a claim came out: "better", "worse" or "no worse"; None: it cannot be told."""
        said = self.verdict.partition(",")[0]
        if claim == "no worse":
            return said != "worse"
        opposite = {"better": "worse", "worse": "better"}[claim]
        return {claim: True, opposite: False}.get(said)


def compare(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]],
    *,
    is_less_better: bool,
    smallest: float,
    alpha: float = 1 - CONFIDENCE,
) -> list[Comparison]:
    """Returns the comparisons of a table, their p-values corrected for each other.

    Args:
      pairs: of each comparison the values of the variant and of the baseline, seed by seed.
      is_less_better: whether a lower value wins.
      smallest: the difference from which on one counts.
      alpha: the rate of false findings that is borne, over the whole table.
    """
    differences = [interval(np.subtract(*map(np.asarray, pair))) for pair in pairs]
    p_values = [paired_p(*pair) for pair in pairs]
    return [
        Comparison(
            difference,
            p_value,
            adjusted,
            verdict(difference, adjusted, is_less_better, smallest, alpha),
        )
        for difference, p_value, adjusted in zip(differences, p_values, holm(p_values), strict=True)
    ]


def verdict(
    difference: Interval,
    adjusted: float,
    is_less_better: bool,
    smallest: float,
    alpha: float = 1 - CONFIDENCE,
) -> str:
    """Returns what the data bear out, in words: see `compare`."""
    if difference.count < FEWEST_SEEDS:
        return "too few seeds"
    if adjusted < alpha:
        word = "better" if (difference.mean < 0) == is_less_better else "worse"
        return word if abs(difference.mean) >= smallest else f"{word}, by less than {smallest:g}"
    if -smallest < difference.low and difference.high < smallest:
        return f"no difference of {smallest:g}"
    return "no difference shown"


Curve = Sequence[tuple[float, float]]  # (compute, metric), compute ascending


def speedup(variant: Curve, baseline: Curve, is_less_better: bool = True) -> float:
    """Returns how much more compute the baseline needs for the same metric: above 1 the variant saves some.

    Both curves are taken as the best that was reached so far, and read between their points along the logarithm of
    compute. Where the variant ends better, it is the baseline's whole compute over what the variant needed to get
    there; where it ends worse, what the baseline needed to get to the variant's end over the variant's whole. NaN
    where a curve never was where the other one ended.
    """
    ours, theirs = (_best_so_far(curve, is_less_better) for curve in (variant, baseline))
    if ours[-1][1] <= theirs[-1][1]:
        needed = _compute_at(ours, theirs[-1][1])
        return theirs[-1][0] / needed
    return _compute_at(theirs, ours[-1][1]) / ours[-1][0]


def _best_so_far(curve: Curve, is_less_better: bool) -> list[tuple[float, float]]:
    sign = 1.0 if is_less_better else -1.0
    best, found = math.inf, []
    for compute, value in curve:
        best = min(best, sign * value)
        found.append((compute, best))
    return found


def _compute_at(curve: Curve, wanted: float) -> float:
    """Returns the compute at which a falling curve reaches a value; NaN if it begins below it, or never does."""
    if curve[0][1] <= wanted:
        return curve[0][0] if curve[0][1] == wanted else math.nan
    for (before, high), (after, low) in zip(curve, curve[1:]):
        if low <= wanted:
            share = (high - wanted) / (high - low)
            return math.exp(math.log(before) + share * (math.log(after) - math.log(before)))
    return math.nan


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Returns slope and intercept of the least squares through points."""
    slope, intercept = np.polyfit(np.asarray(x, np.float64), np.asarray(y, np.float64), 1)
    return float(slope), float(intercept)
