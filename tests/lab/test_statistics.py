"""Statistics are scipy's, findings are as rare as they are said to be, and what is there is found."""

import math

import numpy as np
import pytest
from scipy import stats

from llm_jax.lab import statistics


def test_intervals_are_scipys():
    values = np.random.default_rng(0).normal(size=6)
    found = statistics.interval(values)
    low, high = stats.t.interval(0.95, 5, values.mean(), stats.sem(values))
    np.testing.assert_allclose((found.mean, found.low, found.high), (values.mean(), low, high))
    assert math.isnan(statistics.interval([1.0]).low) and "one seed" in str(
        statistics.interval([1.0])
    )
    assert statistics.interval([2.0, 2.0]).low == 2.0
    for bad in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="no finite values"):
            statistics.interval(bad)


def test_p_values_are_scipys():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 7))
    assert statistics.paired_p(first, second) == stats.ttest_rel(first, second).pvalue
    assert math.isnan(statistics.paired_p([1.0], [2.0]))
    assert statistics.paired_p([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert statistics.paired_p([1.0, 2.0], [0.5, 1.5]) == 0.0
    with pytest.raises(ValueError, match="no pairs"):
        statistics.paired_p([1.0], [1.0, 2.0])


def test_holms_correction():
    # The example of Holm's procedure: sorted, times how many are left, never falling.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]
    found = statistics.holm([0.01, math.nan, 0.02])
    assert math.isnan(found[1]) and found[0] == 0.02 and found[2] == 0.02


def _table(rng, effects, num_seeds, noise=0.02, of_seed=0.1):
    """Values of a baseline and of variants, which share what a seed does."""
    seeds = rng.normal(scale=of_seed, size=num_seeds)
    baseline = 3.0 + seeds + rng.normal(scale=noise, size=num_seeds)
    return [
        (3.0 + effect + seeds + rng.normal(scale=noise, size=num_seeds), baseline)
        for effect in effects
    ]


def _verdicts(pairs):
    found = statistics.compare(pairs, is_less_better=True, smallest=0.0)
    return [comparison.verdict.partition(",")[0] for comparison in found]


def test_an_ablation_of_nothing_finds_nothing_at_the_stated_rate():
    rng = np.random.default_rng(2)
    wrong = sum(
        any(verdict in ("better", "worse") for verdict in _verdicts(_table(rng, [0.0] * 5, 4)))
        for _ in range(1000)
    )
    # Of 1,000 tables 5% may; Holm's bound is from above, as their baseline is one.
    assert wrong <= 1000 * 0.05 + 3 * math.sqrt(1000 * 0.05 * 0.95)
    assert wrong > 0


def test_without_correction_it_would_find_more():
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(1000):
        pairs = _table(rng, [0.0] * 5, 4)
        wrong += any(statistics.paired_p(*pair) < 0.05 for pair in pairs)
    assert wrong > 100


def test_a_planted_effect_is_found():
    rng = np.random.default_rng(3)
    found = [_verdicts(_table(rng, [-0.2, 0.2, 0.0], 5)) for _ in range(100)]
    better, worse, _ = zip(*found)
    assert better.count("better") > 95 and worse.count("worse") > 95


def test_pairs_see_what_seeds_hide():
    rng = np.random.default_rng(4)
    pairs = _table(rng, [-0.1], 5, of_seed=1.0)
    assert _verdicts(pairs) == ["better"]
    assert stats.ttest_ind(*pairs[0]).pvalue > 0.05


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([-0.1], "too few seeds"),
        ([-0.1, -0.1001], "too few seeds"),
        ([-0.1, -0.11, -0.09], "better"),
        ([0.1, 0.11, 0.09], "worse"),
        ([-0.01, -0.011, -0.009], "better, by less than 0.05"),
        ([0.001, -0.001, 0.002], "no difference of 0.05"),
        ([0.3, -0.3, 0.1], "no difference shown"),
    ],
)
def test_verdicts(values, verdict):
    pair = (np.asarray(values) + 2.0, np.full(len(values), 2.0))
    (found,) = statistics.compare([pair], is_less_better=True, smallest=0.05)
    assert found.verdict == verdict
    said = verdict.partition(",")[0]
    claims = {"better": (True, False, True), "worse": (False, True, False)}
    wanted = claims[said] if said in claims else (None, None, True)
    assert tuple(map(found.bears_out, ("better", "worse", "no worse"))) == wanted
    if verdict == "better":
        (found,) = statistics.compare([pair], is_less_better=False, smallest=0.05)
        assert found.verdict == "worse"


def test_a_speedup_is_compute_for_the_same_metric():
    def curve(scale, compute=(1, 2, 4, 8, 16)):
        return [(c, 3.0 - math.log2(c * scale)) for c in compute]

    # On lines over the logarithm of compute the factor is exact, either way.
    assert statistics.speedup(curve(2.0), curve(1.0)) == pytest.approx(2.0)
    assert statistics.speedup(curve(1.0), curve(2.0)) == pytest.approx(0.5)
    assert statistics.speedup(curve(1.0), curve(1.0)) == pytest.approx(1.0)
    # More of something, where more is better.
    negative = [(c, -value) for c, value in curve(2.0)]
    base = [(c, -value) for c, value in curve(1.0)]
    assert statistics.speedup(negative, base, is_less_better=False) == pytest.approx(2.0)
    # A rise does not count as progress undone.
    bumpy = curve(2.0)
    bumpy[3] = (8, 9.0)
    assert statistics.speedup(bumpy, curve(1.0)) > 1.0
    # A curve that begins where the other one ends does not tell.
    assert math.isnan(statistics.speedup([(1, -2.0), (2, -3.0)], curve(1.0)))
