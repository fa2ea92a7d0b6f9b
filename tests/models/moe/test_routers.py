"""Routers by their definitions: loops over tokens in float64, and what each paper promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from llm_jax.models.moe import balance
from llm_jax.models.moe import balanced
from llm_jax.models.moe import routers
from llm_jax.models.moe import routing
from tests import helpers

B, T, E = 3, 20, 8
_TOKENS = np.arange(T)[None] < np.asarray([T, 13, 1])[:, None]


def _logits(seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(scale * rng.standard_normal((B, T, E)), jnp.float32)


def _softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _by_loops(by, weights, k, is_normalised, scale):
    """Returns the weight of each expert for each token, [B, T, E], with the k largest of `by`."""
    wanted = np.zeros((B, T, E))
    for place in np.ndindex(B, T):
        chosen = np.argsort(-by[place], kind="stable")[:k]
        own = weights[place][chosen]
        wanted[place][chosen] = scale * own / (own.sum() if is_normalised else 1.0)
    return wanted


def _within_groups(by, num_groups, groups_per_token, num_best):
    result = np.full_like(by, -np.inf)
    size = E // num_groups
    for place in np.ndindex(B, T):
        groups = by[place].reshape(num_groups, size)
        values = np.sort(groups, axis=1)[:, -num_best:].sum(1)
        for group in np.argsort(-values, kind="stable")[:groups_per_token]:
            span = slice(group * size, (group + 1) * size)
            result[place][span] = by[place][span]
    return result


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("is_normalised", [False, True])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_top_k_of_scores(name, k, is_normalised, groups, has_bias):
    logits = _logits()
    bias = np.linspace(-0.3, 0.3, E) * (1 if has_bias else 0)
    scores = (_softmax if name == "softmax" else _sigmoid)(np.asarray(logits, np.float64))
    by = scores + bias
    if groups != (1, 1):
        by = _within_groups(by, *groups, num_best=1 if name == "softmax" else 2)
    top_k = routers.softmax_top_k if name == "softmax" else routers.sigmoid_top_k
    actual = top_k(
        logits,
        k,
        is_normalised=is_normalised,
        scale=2.5,
        num_groups=groups[0],
        groups_per_token=groups[1],
        bias_E=jnp.asarray(bias, jnp.float32) if has_bias else None,
    )
    wanted = _by_loops(by, scores, k, is_normalised, 2.5)
    helpers.assert_close(actual.weights_BTE(), wanted)
    helpers.assert_close(actual.scores_BTE, scores / scores.sum(-1, keepdims=True))


def test_normalised_softmax_is_that_of_the_chosen_alone():
    logits = _logits()
    actual = routers.softmax_top_k(logits, 2, is_normalised=True).weights_BTR
    helpers.assert_close(actual, _softmax(np.sort(logits, axis=-1)[..., :-3:-1]))


def test_switch_takes_the_best_at_its_probability():
    logits = _logits()
    actual = routers.switch(logits)
    np.testing.assert_array_equal(actual.experts_BTR[..., 0], np.argmax(logits, -1))
    helpers.assert_close(actual.weights_BTR[..., 0], _softmax(np.asarray(logits)).max(-1))


def test_gshard_uses_the_second_as_often_as_its_weight_says():
    logits = jnp.tile(_logits(scale=0.7)[:, :, None], (1, 1, 500, 1)).reshape(B, -1, E)
    draws = jax.random.uniform(jax.random.key(0), logits.shape[:2])
    both = routers.gshard(logits)
    drawn = routers.gshard(logits, draws)
    share = np.asarray(drawn.is_used_BTR[..., 1]).reshape(B, T, 500).mean(-1)
    wanted = np.minimum(2 * np.asarray(both.weights_BTR[..., 1]).reshape(B, T, 500)[..., 0], 1)
    assert 0.1 < wanted.min() < 0.9
    # Three standard deviations of a mean of 500 draws are 0.067.
    np.testing.assert_allclose(share, wanted, atol=0.08)
    assert np.asarray(drawn.is_used_BTR[..., 0]).all() and np.asarray(both.is_used_BTR).all()
    kept = np.asarray(drawn.is_used_BTR[..., 1])
    helpers.assert_equal(drawn.weights_BTR[..., 1], np.where(kept, both.weights_BTR[..., 1], 0))


@pytest.mark.parametrize("bound", [None, 2])
def test_relu_takes_all_above_zero_up_to_its_bound(bound):
    logits = _logits()
    gates = np.maximum(np.asarray(logits), 0)
    wanted = gates
    if bound is not None:
        wanted = np.where(gates >= np.sort(gates, -1)[..., [-bound]], gates, 0)
    actual = routers.relu(logits, bound)
    helpers.assert_close(actual.weights_BTE(), wanted)
    np.testing.assert_array_equal(actual.counts_BE(), (wanted > 0).sum(1))


@pytest.mark.parametrize("name", ["hash", "random"])
@pytest.mark.parametrize("k", [1, 3])
def test_controls_are_even_and_never_repeat_an_expert(name, k):
    values = jnp.arange(8_000).reshape(2, 4_000)
    if name == "hash":
        actual = routers.hashed(values, E, k)
        again = routers.hashed(values[:, ::-1], E, k)
        helpers.assert_equal(again.experts_BTR[:, ::-1], actual.experts_BTR)
    else:
        bits = jax.random.bits(jax.random.key(0), values.shape)
        actual = routers.at_random(bits, E, k)
    experts = np.sort(actual.experts_BTR, axis=-1)
    assert (np.diff(experts) > 0).all() and experts.min() >= 0 and experts.max() < E
    helpers.assert_equal(actual.weights_BTR, np.full_like(actual.weights_BTR, 1 / k))
    load = np.asarray(actual.counts_BE()).sum(0)
    assert balance.max_violation(load) < 0.1


def test_expert_choice_fills_each_expert_with_its_best_tokens():
    logits = _logits()
    k = 2
    actual = balanced.expert_choice(logits, jnp.asarray(_TOKENS), k)
    scores = _softmax(np.asarray(logits, np.float64))
    wanted = np.zeros_like(scores)
    size = T * k // E
    for row, expert in np.ndindex(B, E):
        own = np.where(_TOKENS[row], scores[row, :, expert], -1)
        for token in np.argsort(-own, kind="stable")[:size]:
            if _TOKENS[row, token]:
                wanted[row, token, expert] = scores[row, token, expert]
    helpers.assert_close(actual.weights_BTE(), wanted)
    assert actual.room == E * size
    assert (np.asarray(actual.counts_BE())[0] == size).all()


def test_expert_choice_sees_the_future_and_others_do_not():
    """Why a decoder may not have it: a later token takes an earlier one's place."""
    logits = _logits()
    changed = logits.at[:, -1].set(8.0)
    everywhere = jnp.ones((B, T), bool)
    is_token_choice_moved = []
    before, after = (
        balanced.expert_choice(x, everywhere, 2).weights_BTE()[:, :-1] for x in (logits, changed)
    )
    assert np.abs(before - after).max() > 0.1
    for choose in (
        lambda x: routers.softmax_top_k(x, 2, is_normalised=True),
        lambda x: routers.sigmoid_top_k(x, 2, is_normalised=True),
        routers.switch,
        routers.gshard,
        routers.relu,
        balanced.greedy,
    ):
        before, after = (choose(x).weights_BTE()[:, :-1] for x in (logits, changed))
        is_token_choice_moved.append(bool((before != after).any()))
    assert not any(is_token_choice_moved)


def test_sinkhorn_evens_out_a_popular_expert():
    logits = _logits().at[..., 0].add(4.0)
    everywhere = jnp.ones((B, T), bool)
    plain = routers.softmax_top_k(logits, 1, is_normalised=False)
    even = balanced.sinkhorn(logits, everywhere, 1, iterations=50, is_normalised=False)
    assert balance.max_violation(plain.counts_BE()).min() > 3
    assert balance.max_violation(even.counts_BE()).max() < 1.5
    # Weights are of the scores as they were, whatever was chosen.
    scores = routing.at(jax.nn.softmax(logits), even.experts_BTR)
    helpers.assert_close(even.weights_BTR, scores)


def test_sinkhorn_ignores_padding():
    logits = _logits()
    other = jnp.where(_TOKENS[..., None], logits, 50.0)
    chosen = [
        balanced.sinkhorn(x, jnp.asarray(_TOKENS), 2, iterations=8, is_normalised=True)
        for x in (logits, other)
    ]
    first, second = (np.asarray(x.experts_BTR)[_TOKENS] for x in chosen)
    np.testing.assert_array_equal(first, second)


def _best_assignment(values):
    """Returns the largest sum of values over assignments of equally many tokens to each expert."""
    places = np.repeat(values, len(values) // values.shape[1], axis=1)
    rows, columns = optimize.linear_sum_assignment(-places)
    return places[rows, columns].sum()


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_base_gives_each_expert_as_many_tokens_at_nearly_the_best_sum(scale):
    logits = jnp.asarray(
        np.random.default_rng(1).standard_normal((B, 4 * E, E)) * scale, jnp.float32
    )
    logits = logits.at[..., 0].add(2.0)
    actual = balanced.base(logits, jnp.ones(logits.shape[:2], bool))
    np.testing.assert_array_equal(actual.counts_BE(), np.full((B, E), 4.0))
    values = _sigmoid(np.asarray(logits, np.float64))
    got = np.asarray(routing.at(jnp.asarray(values), actual.experts_BTR)).sum(axis=(1, 2))
    best = np.asarray([_best_assignment(row) for row in values])
    # The auction's promise: the number of tokens times its smallest raise.
    assert (got > best - 4 * E * 1e-2).all() and (got <= best + 1e-4).all()


def test_base_gives_padding_what_tokens_leave():
    logits = _logits()
    other = jnp.where(_TOKENS[..., None], logits, -logits)
    first, second = (balanced.base(x, jnp.asarray(_TOKENS)).experts_BTR for x in (logits, other))
    np.testing.assert_array_equal(np.asarray(first)[_TOKENS], np.asarray(second)[_TOKENS])


# --- losses, statistics, and what moves without gradients -------------------------------------------


@pytest.mark.parametrize("over", ["batch", "sequence"])
def test_load_balance_is_the_product_of_shares(over):
    logits, is_token = _logits(), jnp.asarray(_TOKENS)
    routed = routers.softmax_top_k(logits, 2, is_normalised=False).without(~is_token[..., None])
    scores = _softmax(np.asarray(logits, np.float64))
    used = np.asarray(routed.weights_BTE()) > 0
    rows = [[0, 1, 2]] if over == "batch" else [[0], [1], [2]]
    wanted = []
    for own in rows:
        tokens = _TOKENS[own]
        f = used[own][tokens].sum(0) / used[own][tokens].sum()
        wanted.append(E * (f * scores[own][tokens].mean(0)).sum())
    helpers.assert_close(balance.load_balance(routed, is_token, over), np.mean(wanted))


def test_load_balance_is_one_when_even_and_its_gradient_presses_for_it():
    even = routing.of_chosen(
        jnp.arange(T)[None, :, None] % E, jnp.ones((1, T, 1)), jnp.full((1, T, E), 1 / E)
    )
    everywhere = jnp.ones((1, T), bool)
    assert float(balance.load_balance(even, everywhere)) == pytest.approx(1.0, abs=1e-6)

    def loss(shift):
        logits = _logits().at[..., 0].add(1.0 + shift)
        routed = routers.softmax_top_k(logits, 2, is_normalised=True)
        return balance.load_balance(routed, jnp.ones((B, T), bool))

    assert jax.grad(loss)(0.0) > 0


def test_rows_without_tokens_do_not_count():
    is_token = jnp.asarray(_TOKENS).at[2].set(False)
    routed = routers.softmax_top_k(_logits(), 2, is_normalised=False).without(~is_token[..., None])
    two = jax.tree.map(lambda x: x[:2], routed)
    for over in ("batch", "sequence"):
        helpers.assert_close(
            balance.load_balance(routed, is_token, over),
            balance.load_balance(two, is_token[:2], over),
        )


def test_relu_loss_is_the_mean_gate_where_loads_are_as_wanted():
    gates = np.zeros((1, E, E), np.float32)
    for token in range(E):
        gates[0, token, [token, (token + 1) % E]] = 0.5 + token
    loss = balance.relu_loss(jnp.asarray(gates), jnp.ones((1, E), bool), experts_per_token=2)
    helpers.assert_close(loss, gates.sum(-1).mean())


@pytest.mark.parametrize(
    "load, violation, entropy",
    [([2.0, 2, 2, 2], 0.0, 1.0), ([8.0, 0, 0, 0], 3.0, 0.0), ([4.0, 4, 0, 0], 1.0, 0.5)],
)
def test_statistics_of_a_load(load, violation, entropy):
    load = jnp.asarray(load)
    assert float(balance.max_violation(load)) == pytest.approx(violation)
    assert float(balance.load_entropy(load)) == pytest.approx(entropy, abs=1e-6)
    zero = jnp.zeros(())
    routed = balance.Routed(zero, load, zero + 2, zero + 4, zero + 3, zero, zero + 8)
    shown = balance.statistics(routed)
    assert float(shown["dead_experts"]) == (np.asarray(load) == 0).sum()
    assert float(shown["drop_fraction"]) == 0.25 and float(shown["confidence"]) == 0.75
    assert float(shown["experts_per_token"]) == 2.0 and float(shown["z_squared"]) == 2.0


def test_bias_moves_towards_an_even_load():
    load = jnp.asarray([[5.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
    moved = balance.next_bias(jnp.zeros((2, 3)), load, 0.1)
    helpers.assert_close(moved, np.asarray([[-0.1, 0.1, 0.0], [0.0, 0.0, 0.0]]))


def test_penalty_grows_while_tokens_have_too_many_experts():
    load, tokens = jnp.asarray([[6.0, 6.0], [2.0, 2.0], [4.0, 4.0]]), jnp.full(3, 4.0)
    moved = balance.next_penalty(jnp.ones(3), load, tokens, experts_per_token=2, rate=1.5)
    helpers.assert_close(moved, np.asarray([1.5, 1 / 1.5, 1.0]))


def test_loss_free_balancing_evens_out_a_skewed_router():
    """Wang et al. 2024: the bias alone brings the violation down, weights are not touched."""
    logits = _logits(scale=0.5) + jnp.linspace(1.5, -1.5, E)

    def step(bias, _):
        routed = routers.sigmoid_top_k(logits, 2, is_normalised=True, bias_E=bias)
        load = jnp.sum(routed.counts_BE(), axis=0)
        return balance.next_bias(bias, load, 0.01), balance.max_violation(load)

    _, violations = jax.lax.scan(step, jnp.zeros(E), length=200)
    assert violations[0] > 2 and violations[-20:].mean() < 0.3 * violations[0]
