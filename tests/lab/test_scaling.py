"""Laws of scale: what was planted is found, and what cannot be told is refused."""

import numpy as np
import pytest

from llm_jax import errors
from llm_jax.lab import scaling

# Of Hoffmann et al. 2022, equation 10.
PLANTED = scaling.Law(1.69, 406.4, 0.34, 410.7, 0.28)


def _points(law=PLANTED, noise=0.0, seed=0):
    """Returns runs of three budgets, five sizes around the best of each."""
    rng, found = np.random.default_rng(seed), []
    for budget in (1e18, 1e19, 1e20):
        for ratio in (0.25, 0.5, 1.0, 2.0, 4.0):
            size = ratio * _best(law, budget)
            tokens = budget / (6 * size)
            loss = law.loss(size, tokens) * np.exp(noise * rng.standard_normal())
            found.append(scaling.Point(size, tokens, loss, budget))
    return found


def _best(law, budget):
    """Returns the best size in closed form (equation 4)."""
    ratio = (law.alpha * law.a / (law.beta * law.b)) ** (1 / (law.alpha + law.beta))
    return ratio * (budget / 6) ** law.size_exponent


def test_a_planted_law_is_found():
    law = scaling.fit(_points())
    for size, tokens in ((1e8, 2e9), (7e10, 1.4e12)):  # the second is far outside
        assert law.loss(size, tokens) == pytest.approx(PLANTED.loss(size, tokens), rel=5e-3)
    assert law.alpha == pytest.approx(PLANTED.alpha, abs=0.02)
    assert law.beta == pytest.approx(PLANTED.beta, abs=0.02)
    assert law.size_exponent == pytest.approx(PLANTED.size_exponent, abs=0.03)


def test_parabolas_find_the_best_size_of_each_budget():
    found = scaling.minima(_points())
    for budget, one in found.items():
        assert one.is_inside
        assert one.parameters == pytest.approx(_best(PLANTED, budget), rel=0.1)
        tokens = budget / (6 * one.parameters)
        assert one.loss == pytest.approx(PLANTED.loss(one.parameters, tokens), rel=2e-3)
    exponent = scaling.size_exponent(_points())
    assert exponent == pytest.approx(PLANTED.size_exponent, abs=0.01)


def test_a_best_size_outside_of_the_sizes_is_told():
    points = [one for one in _points() if one.parameters > 1.5 * _best(PLANTED, one.budget)]
    more = [scaling.Point(4 * p.parameters, p.tokens / 4, p.loss + 0.2, p.budget) for p in points]
    assert not any(one.is_inside for one in scaling.minima([*points, *more]).values())


def test_an_outlier_does_not_move_the_law():
    """What Huber's loss is for."""
    points = _points()
    bad = scaling.Point(points[7].parameters, points[7].tokens, 1.2 * points[7].loss)
    law = scaling.fit([*points, bad])
    assert law.loss(1e9, 2e10) == pytest.approx(PLANTED.loss(1e9, 2e10), rel=0.01)


def test_intervals_hold_what_was_planted_and_narrow_with_less_noise():
    """Twenty draws of five seeds; of intervals of 90% at least twelve must hold the exponent."""
    widths, num_held = [], 0
    for trial in range(20):
        by_seed = {seed: _points(noise=3e-3, seed=100 * trial + seed) for seed in range(5)}
        low, high = scaling.bootstrap(by_seed, scaling.size_exponent, 100, 0.9)
        num_held += low < PLANTED.size_exponent < high
        widths.append(high - low)
    assert num_held >= 12
    quiet = {seed: _points(noise=3e-4, seed=seed) for seed in range(5)}
    low, high = scaling.bootstrap(quiet, scaling.size_exponent, 100, 0.9)
    assert high - low < 0.3 * np.mean(widths)


def test_a_law_of_a_resample_begins_where_that_of_all_ended():
    points = _points(noise=1e-3)
    law = scaling.fit(points)
    again = scaling.refit(points, law)
    assert again.loss(1e9, 1e10) == pytest.approx(law.loss(1e9, 1e10), rel=1e-4)


def test_too_few_points_are_refused():
    with pytest.raises(errors.UserError, match="5 points do not tell a law of five numbers"):
        scaling.fit(_points()[:5])
    with pytest.raises(errors.UserError, match="2 sizes do not tell the best one for 1e"):
        scaling.minima(_points()[:2])
