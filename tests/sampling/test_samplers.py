"""Choosing tokens: each transform against brute force, and draws against their probabilities."""

import functools
import math

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llm_jax import errors
from llm_jax.sampling import samplers

VOCAB = 7
NUM_DRAWS = 20_000

settings = hypothesis.settings(max_examples=60, deadline=None)
# Steps of 1/4 make ties common; the width keeps every probability above the float32 resolution.
levels = st.integers(-16, 16).map(lambda n: n / 4)
logits_rows = st.lists(levels, min_size=VOCAB, max_size=VOCAB)
distinct_rows = st.permutations([n / 4 for n in range(-16, 16)]).map(lambda row: row[:VOCAB])


def _kept(masked_BV) -> list[bool]:
    """Returns which tokens of a single row can still be drawn."""
    return (np.asarray(masked_BV)[0] > samplers._MASKED).tolist()


def _probabilities(logits) -> np.ndarray:
    exponentials = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return exponentials / exponentials.sum()


def _row(logits) -> jax.Array:
    return jnp.asarray([logits], jnp.float32)


# --- the transforms -----------------------------------------------------------------------------


@settings
@hypothesis.given(distinct_rows, st.integers(1, VOCAB + 2))
def test_top_k_keeps_exactly_the_k_best(logits, k):
    best = set(sorted(logits, reverse=True)[:k])
    masked = samplers.keep_top_k(_row(logits), k)
    assert _kept(masked) == [x in best for x in logits]
    np.testing.assert_array_equal(
        np.asarray(masked)[0][_kept(masked)], np.float32(logits)[_kept(masked)]
    )


@settings
@hypothesis.given(logits_rows, st.integers(1, VOCAB))
def test_top_k_keeps_what_ties_with_the_kth(logits, k):
    kth = sorted(logits, reverse=True)[k - 1]
    assert _kept(samplers.keep_top_k(_row(logits), k)) == [x >= kth for x in logits]


@settings
@hypothesis.given(logits_rows, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_nucleus(logits, p):
    probs = _probabilities(logits)
    order = np.argsort(-probs, kind="stable")
    sums = np.cumsum(probs[order])
    hypothesis.assume(np.min(np.abs(sums - p)) > 1e-5)  # float32 cannot tell these from p
    size = 1 + int(np.searchsorted(sums, p))  # the smallest whose sum reaches p
    lowest = np.asarray(logits)[order[size - 1]]
    masked = samplers.keep_top_p(_row(logits), p)
    assert _kept(masked) == [x >= lowest for x in logits]
    np.testing.assert_array_equal(
        np.asarray(masked)[0][_kept(masked)], np.float32(logits)[_kept(masked)]
    )


@settings
@hypothesis.given(logits_rows, st.floats(0.001, 0.999))
def test_min_p_keeps_what_has_that_share_of_the_best(logits, p):
    share = _probabilities(logits) / _probabilities(logits).max()
    hypothesis.assume(np.min(np.abs(np.log(share / p))) > 1e-5)
    masked = samplers.keep_min_p(_row(logits), p)
    assert _kept(masked) == (share >= p).tolist()
    np.testing.assert_array_equal(
        np.asarray(masked)[0][_kept(masked)], np.float32(logits)[_kept(masked)]
    )


@settings
@hypothesis.given(
    logits_rows,
    st.lists(st.booleans(), min_size=VOCAB, max_size=VOCAB),
    st.floats(0.1, 10.0),
)
def test_repetition_penalty_divides_positive_and_multiplies_negative_logits(logits, seen, penalty):
    expected = [
        x if not is_seen else x / penalty if x > 0 else x * penalty
        for x, is_seen in zip(logits, seen)
    ]
    got = samplers.penalise_repetition(_row(logits), jnp.asarray([seen]), penalty)
    np.testing.assert_allclose(np.asarray(got)[0], expected, rtol=1e-6)


@settings
@hypothesis.given(logits_rows)
def test_neutral_values_are_the_identity(logits):
    row = _row(logits)
    defaults = samplers.SamplingParams()
    everything = jnp.ones((1, VOCAB), bool)
    for same in (
        samplers.keep_top_k(row, defaults.top_k),
        samplers.keep_top_k(row, VOCAB),
        samplers.keep_top_p(row, defaults.top_p),
        samplers.keep_min_p(row, defaults.min_p),
        samplers.penalise_repetition(row, everything, defaults.repetition_penalty),
    ):
        np.testing.assert_array_equal(same, row)


def test_each_row_is_cut_by_its_own_logits():
    logits_BV = jnp.asarray([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
    first = [[False, False, True, True], [True, True, False, False]]
    for masked in (
        samplers.keep_top_k(logits_BV, 2),
        samplers.keep_top_p(logits_BV, 0.8),
        samplers.keep_min_p(logits_BV, 0.3),
    ):
        assert (np.asarray(masked) > samplers._MASKED).tolist() == first


# --- choosing -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="params")
def _choose(logits_BV, is_seen_BV, keys_B, params):
    return samplers.choose(logits_BV, is_seen_BV, params, keys_B)


def _draws(logits, params, seen=None) -> np.ndarray:
    """Returns how often each token is drawn."""
    logits_BV = jnp.tile(_row(logits), (NUM_DRAWS, 1))
    seen_BV = None if seen is None else jnp.tile(jnp.asarray([seen]), (NUM_DRAWS, 1))
    keys_B = jax.random.split(jax.random.key(11), NUM_DRAWS)
    return np.bincount(_choose(logits_BV, seen_BV, keys_B, params), minlength=len(logits))


@settings
@hypothesis.given(
    distinct_rows,
    st.sampled_from([0.0, 1e-3, 1e-6, 1e-20, 1e-37, 1e-45, 1e-60]),
    st.integers(0, 2**31 - 1),
)
def test_towards_temperature_zero_is_greedy(logits, temperature, seed):
    chosen = samplers.choose(
        _row(logits),
        None,
        samplers.SamplingParams(temperature),
        jax.random.split(jax.random.key(seed), 1),
    )
    assert chosen.dtype == jnp.int32
    assert int(chosen[0]) == int(np.argmax(logits))


@pytest.mark.parametrize(
    "params", [samplers.SamplingParams(top_k=1), samplers.SamplingParams(top_p=1e-6)]
)
def test_keeping_one_candidate_is_greedy(params):
    counts = _draws([0.1, 0.3, 0.2], params)
    assert counts.tolist() == [0, NUM_DRAWS, 0]


LOGITS = [2.0, 1.5, 1.4, 0.0, -0.5, -3.0, 0.7]


def _expected(logits, params, seen=None) -> np.ndarray:
    """Returns the probabilities that the parameters stand for, in float64, one row."""
    logits = np.asarray(logits, np.float64)
    if seen is not None:
        penalty = params.repetition_penalty
        logits = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits / params.temperature
    order = np.argsort(-logits)
    if params.top_k:
        logits[order[params.top_k :]] = -np.inf
    sums = np.cumsum(_probabilities(logits)[order])
    if params.top_p < 1:
        logits[order[1 + int(np.searchsorted(sums, params.top_p)) :]] = -np.inf
    probs = _probabilities(logits)
    probs[probs < params.min_p * probs.max()] = 0.0
    return probs / probs.sum()


@pytest.mark.parametrize(
    ("params", "seen"),
    [
        (samplers.SamplingParams(), None),
        (samplers.SamplingParams(temperature=2.0), None),
        (samplers.SamplingParams(temperature=0.5), None),
        (samplers.SamplingParams(top_k=3), None),
        (samplers.SamplingParams(top_p=0.7), None),
        (samplers.SamplingParams(min_p=0.2), None),
        (samplers.SamplingParams(repetition_penalty=2.0), [True, False] * 3 + [True]),
        (samplers.SamplingParams(temperature=2.0, top_p=0.7), None),  # hot first, then cut
        (samplers.SamplingParams(0.7, 5, 0.9, 0.1, 1.5), [True, False] * 3 + [True]),
    ],
    ids=["plain", "hot", "cold", "top_k", "top_p", "min_p", "penalty", "hot_then_cut", "all"],
)
def test_frequencies_match_probabilities(params, seen):
    probs = _expected(LOGITS, params, seen)
    counts = _draws(LOGITS, params, seen)
    assert counts.sum() == NUM_DRAWS
    assert counts[probs == 0].sum() == 0
    possible = probs > 0
    result = stats.chisquare(counts[possible], NUM_DRAWS * probs[possible])
    assert result.pvalue > 1e-3  # the seed is fixed: this holds always or never


def test_a_rows_draw_is_its_own():
    keys_B = jax.random.split(jax.random.key(5), 64)
    logits_BV = jax.random.normal(jax.random.key(6), (64, 50))
    params = samplers.SamplingParams(0.9, 30, 0.95, 0.01)
    together = samplers.choose(logits_BV, None, params, keys_B)
    alone = [
        int(samplers.choose(logits_BV[i : i + 1], None, params, keys_B[i : i + 1])[0])
        for i in range(0, 64, 7)
    ]
    assert together[::7].tolist() == alone
    assert len(set(together.tolist())) > 10


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
    ],
)
def test_bad_values_are_refused_by_the_name_of_their_flag(name, value):
    with pytest.raises(errors.UserError, match=rf"^--{name}={value} must be "):
        samplers.SamplingParams(**{name: value})
