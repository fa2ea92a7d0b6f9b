"""Schedules at their corners; optimisers by what their papers promise."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import config as config_lib
from llm_jax import optim
from tests import helpers

PEAK, STEPS, WARMUP = 0.5, 100, 10


def _schedule(name, num_steps=STEPS, **changes):
    fields = {"learning_rate": PEAK, "warmup_steps": WARMUP, "final_lr_fraction": 0.1}
    config = config_lib.OptimConfig(schedule=name, **(fields | changes))
    schedule = optim.make_schedule(config, num_steps)
    return np.asarray(jax.vmap(schedule)(jnp.arange(num_steps)), np.float64)


@pytest.mark.parametrize("name", config_lib.SCHEDULES)
def test_warmup_climbs_evenly_to_the_peak(name):
    rates = _schedule(name)
    assert rates[0] == pytest.approx(PEAK / (WARMUP + 1))
    np.testing.assert_allclose(np.diff(rates[: WARMUP + 1]), PEAK / (WARMUP + 1), rtol=1e-5)
    assert rates[WARMUP] == rates.max() == pytest.approx(PEAK)


@pytest.mark.parametrize("name", config_lib.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 99, 100])
@pytest.mark.parametrize("final", [0.0, 1.0])
def test_rates_stay_between_zero_and_the_peak(name, warmup, final):
    rates = _schedule(name, warmup_steps=warmup, final_lr_fraction=final)
    assert np.isfinite(rates).all()
    assert rates.min() >= 0 and rates.max() <= PEAK * (1 + 1e-6)
    assert np.all(np.diff(rates[warmup:]) <= 1e-7)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_last_update_runs_at_the_final_rate(name, warmup):
    rates = _schedule(name, warmup_steps=warmup)
    assert rates[-1] == pytest.approx(0.1 * PEAK, rel=1e-5)
    assert rates[-2] > rates[-1] * (1 + 1e-5)


def test_cosine_and_linear_at_half_time():
    middle = WARMUP + (STEPS - 1 - WARMUP) / 2
    for name in ("cosine", "linear"):
        rates = _schedule(name)
        around = (rates[int(np.floor(middle))] + rates[int(np.ceil(middle))]) / 2
        assert around == pytest.approx(0.55 * PEAK, rel=1e-4)
    decay = _schedule("linear")[WARMUP:]
    np.testing.assert_allclose(np.diff(decay), (0.1 - 1) * PEAK / (len(decay) - 1), rtol=1e-4)
    # A cosine starts flat.
    cosine = _schedule("cosine")[WARMUP:]
    assert cosine[0] - cosine[1] < 0.05 * (decay[0] - decay[1])


def test_wsd_is_flat_then_linear():
    rates = _schedule("wsd", cooldown_fraction=0.2)
    np.testing.assert_allclose(rates[WARMUP:80], PEAK, rtol=1e-6)
    np.testing.assert_allclose(np.diff(rates[79:]), -0.9 * PEAK / 20, rtol=1e-4)


def test_inverse_sqrt_falls_with_the_root_of_the_step():
    rates = _schedule("inverse_sqrt")
    assert rates[40] / rates[WARMUP] == pytest.approx(0.5, rel=1e-5)
    assert rates[90] / rates[40] == pytest.approx(2 / 3, rel=1e-5)


def test_constant():
    np.testing.assert_allclose(_schedule("constant")[WARMUP:], PEAK, rtol=1e-7)


# --- which parameters -------------------------------------------------------------------------

EVERYTHING = helpers.GPT2 | {
    "use_qk_norm": True,
    "tie_embeddings": False,
    "is_gated": True,
    "num_kv_heads": 2,
}


def _by_name(tree):
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p).removesuffix(".value").lstrip("."): leaf for p, leaf in named}


def _model():
    return helpers.random_model(helpers.tiny_model_config(**EVERYTHING), *helpers.make_mesh())


def test_decay_takes_matrices_alone():
    mask = _by_name(optim.decay_mask(_model()))
    layers = "stack.layers."
    assert {name for name, is_decayed in mask.items() if is_decayed} == {
        "embedding.table_VD",
        "position_PD",
        "head_DV",
        layers + "attention.q_DKGC",
        layers + "attention.k_DKC",
        layers + "attention.v_DKC",
        layers + "attention.out_KGCD",
        layers + "mlp.up_DF",
        layers + "mlp.gate_DF",
        layers + "mlp.out_FD",
    }
    assert {name for name, is_decayed in mask.items() if not is_decayed} == {
        "final_norm.scale_D",
        "final_norm.bias_D",
        layers + "attention_norm.scale_D",
        layers + "attention_norm.bias_D",
        layers + "attention.q_bias_KGC",
        layers + "attention.k_bias_KC",
        layers + "attention.v_bias_KC",
        layers + "attention.out_bias_D",
        layers + "attention.q_norm.scale_C",
        layers + "attention.k_norm.scale_C",
        layers + "mlp_norm.scale_D",
        layers + "mlp_norm.bias_D",
        layers + "mlp.up_bias_F",
        layers + "mlp.gate_bias_F",
        layers + "mlp.out_bias_D",
    }


def test_muon_takes_the_matrices_of_layers_alone():
    labels = _by_name(optim.muon_labels(_model()))
    assert set(labels.values()) == {"muon", "adam"}
    muon = {name for name, label in labels.items() if label == "muon"}
    decayed = {
        name for name, is_decayed in _by_name(optim.decay_mask(_model())).items() if is_decayed
    }
    assert muon == {name for name in decayed if name.startswith("stack.layers.")}


# --- updates ----------------------------------------------------------------------------------


class Params(NamedTuple):
    """A small problem: names end in letters, as those of a model do."""

    table_VD: jax.Array
    up_DF: jax.Array
    up_bias_F: jax.Array
    scale_D: jax.Array


def _params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (12, 6), (6, 10), (10,), (6,)
    return Params(*(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes))


def _loss(params):
    x = params.table_VD * params.scale_D
    target = jnp.asarray(np.random.default_rng(9).standard_normal((12, 10)), jnp.float32)
    return jnp.mean((x @ params.up_DF + params.up_bias_F - target) ** 2)


def _optimizer(schedule=None, **changes):
    config = config_lib.OptimConfig(**changes)
    return optim.make_optimizer(config, schedule or optax.constant_schedule(config.learning_rate))


@pytest.mark.parametrize("name", config_lib.OPTIMIZERS)
def test_lowers_a_loss(one_device, name):
    rate = 0.1 if name == "sgd" else 0.02
    optimizer = _optimizer(name=name, learning_rate=rate, weight_decay=0.0)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(_loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = _params()
    state, first = optimizer.init(params), _loss(params)
    for _ in range(60):
        params, state = step(params, state)
    assert _loss(params) < 0.4 * first


@pytest.mark.parametrize("name", config_lib.OPTIMIZERS)
def test_weight_decay_means_the_same_for_all(one_device, name):
    """Without a gradient, a step multiplies matrices by 1 - learning rate * weight decay."""
    rate, decay = 0.1, 0.3
    optimizer = _optimizer(name=name, learning_rate=rate, weight_decay=decay)
    params = _params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    for matrix in ("table_VD", "up_DF"):
        wanted = np.asarray(getattr(params, matrix)) * (1 - rate * decay)
        np.testing.assert_allclose(getattr(after, matrix), wanted, rtol=1e-6)
    for vector in ("up_bias_F", "scale_D"):
        np.testing.assert_array_equal(getattr(after, vector), getattr(params, vector))


def test_independent_decay_follows_the_schedule_and_not_its_peak(one_device):
    params = _params()
    zeros, decay = jax.tree.map(jnp.zeros_like, params), 0.01
    for peak in (1e-4, 1e-1):
        for share in (1.0, 0.25):  # of the peak, where the schedule stands
            optimizer = _optimizer(
                optax.constant_schedule(share * peak),
                learning_rate=peak,
                weight_decay=decay,
                is_decay_independent=True,
            )
            updates, _ = optimizer.update(zeros, optimizer.init(params), params)
            after = optax.apply_updates(params, updates)
            wanted = np.asarray(params.up_DF) * (1 - share * decay)
            np.testing.assert_allclose(after.up_DF, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", config_lib.OPTIMIZERS)
def test_step_is_proportional_to_the_learning_rate(one_device, name):
    params, grads = _params(), _params(1)

    def update(rate):
        optimizer = _optimizer(name=name, learning_rate=rate, weight_decay=0.0)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    small, large = update(1e-3), update(3e-3)
    # Schedule-free keeps what moves, rounded to its own size, and not the step.
    tolerance = 2e-4 if name == "schedule_free" else 1e-5
    helpers.assert_close(large, jax.tree.map(lambda x: 3 * x, small), tolerance)
    for step, grad in zip(small, grads):
        assert jnp.vdot(step, grad) < 0


@pytest.mark.parametrize("shape", [(3, 6, 10), (3, 10, 6), (1, 8, 8)])
def test_muon_update_is_orthogonal_with_the_size_of_adam(one_device, shape):
    """Each layer of a stack by itself.

    Five steps of the quintic Newton-Schulz iteration leave singular values in about [0.68, 1.13]
    (Jordan et al. 2024); 0.70 and 1.13 were seen. Those of the gradient span two decades.
    """

    class Stack(NamedTuple):
        up_DF: jax.Array

    rng = np.random.default_rng(0)
    u_LMM, _, v_LNN = np.linalg.svd(rng.standard_normal(shape))
    rank = min(shape[1:])
    spread = np.geomspace(1.0, 0.02, rank)
    grad_LMN = (u_LMM[:, :, :rank] * spread) @ v_LNN[:, :rank]
    grad_LMN *= np.array([1.0, 1e-3, 1e3])[: shape[0], None, None]  # scales must not mix
    grads = Stack(jnp.asarray(grad_LMN, jnp.float32))
    optimizer = _optimizer(name="muon", learning_rate=1.0, weight_decay=0.0)
    params = jax.tree.map(jnp.zeros_like, grads)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    values = np.linalg.svd(np.asarray(updates.up_DF), compute_uv=False)
    unit = 0.2 * max(shape[1:]) ** 0.5
    assert values.min() > 0.68 * unit and values.max() < 1.15 * unit
    # Same singular directions, downhill.
    for update, grad in zip(np.asarray(updates.up_DF), grad_LMN):
        u_MM, _, v_NN = np.linalg.svd(grad)
        rotated = u_MM[:, :rank].T @ update @ v_NN[:rank].T
        assert np.all(np.diag(rotated) < -0.68 * unit)
        assert np.abs(rotated - np.diag(np.diag(rotated))).max() < 1e-5 * unit


def test_muon_sees_heads_as_one_matrix(one_device):
    """A [D, K, C] weight is orthogonalised as D x (K C), and [K, G, C, D] as (K G C) x D."""

    class Weights(NamedTuple):
        k_DKC: jax.Array
        out_KGCD: jax.Array

    rng = np.random.default_rng(0)
    grads = Weights(
        jnp.asarray(rng.standard_normal((6, 2, 4)), jnp.float32),
        jnp.asarray(rng.standard_normal((2, 2, 3, 6)), jnp.float32),
    )
    optimizer = _optimizer(name="muon", learning_rate=1.0, weight_decay=0.0)
    params = jax.tree.map(jnp.zeros_like, grads)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for update, rows, longest in ((updates.k_DKC, 6, 8), (updates.out_KGCD, 12, 12)):
        values = np.linalg.svd(np.asarray(update).reshape(rows, -1), compute_uv=False)
        unit = 0.2 * longest**0.5
        assert values.min() > 0.68 * unit and values.max() < 1.15 * unit


def _run(optimizer, num_steps=5):
    params = _params()
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(num_steps):
        updates, state = update(_params(step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params


SCHEDULE = optax.linear_schedule(0.1, 0.01, 5)
MASK = Params(True, True, False, False)


@pytest.mark.parametrize(
    "name, options, wanted",
    [
        (
            "adamw",
            {"b1": 0.8, "b2": 0.9, "epsilon": 1e-3},
            functools.partial(optax.adamw, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3, mask=MASK),
        ),
        (
            "lion",
            {"b1": 0.8, "b2": 0.9},
            functools.partial(optax.lion, b1=0.8, b2=0.9, weight_decay=0.3, mask=MASK),
        ),
        (
            "sgd",
            {"b1": 0.8, "weight_decay": 0.0},
            functools.partial(optax.sgd, momentum=0.8),
        ),
    ],
)
def test_equals_that_of_optax(name, options, wanted):
    ours = _optimizer(SCHEDULE, name=name, **({"weight_decay": 0.3} | options))
    helpers.assert_close(_run(ours), _run(wanted(SCHEDULE)))


def test_adamw_first_step_by_hand():
    optimizer = _optimizer(name="adamw", learning_rate=0.1, weight_decay=0.5, epsilon=1e-8)
    params, grads = _params(), _params(1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    decay = [0.5, 0.5, 0.0, 0.0]
    for update, param, grad, rate in zip(updates, params, grads, decay):
        wanted = -0.1 * (np.sign(grad) + rate * np.asarray(param))
        np.testing.assert_allclose(update, wanted, rtol=1e-4, atol=1e-6)


# --- schedule-free ------------------------------------------------------------------------------


def test_schedule_free_is_the_average_of_its_paper(one_device):
    """Equations 3 to 5 of Defazio et al. 2024, with Adam's second moment and weights of squared rates."""
    rates = [0.02, 0.04, 0.06, 0.08, 0.08, 0.08]
    b1, b2, epsilon, decay = 0.9, 0.95, 1e-8, 0.3
    schedule = lambda step: jnp.asarray(rates)[jnp.minimum(step, 5)]  # noqa: E731
    config = config_lib.OptimConfig(name="schedule_free", weight_decay=decay, schedule="constant")
    optimizer = optim.make_optimizer(config, schedule)
    params = _params()
    state = optimizer.init(params)
    x = z = np.asarray(params.up_DF, np.float64)
    second, weights = np.zeros_like(x), 0.0
    for step in range(5):
        grads = _params(step + 1)
        point = optim.gradient_point(config, state, params)
        y = (1 - b1) * z + b1 * x
        np.testing.assert_allclose(point.up_DF, y, rtol=1e-5, atol=1e-6)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        gradient = np.asarray(grads.up_DF, np.float64)
        second = b2 * second + (1 - b2) * gradient**2
        scale = np.sqrt(second / (1 - b2 ** (step + 1))) + epsilon
        z = z - rates[step] * (gradient / scale + decay * y)
        # optax weights a step by the rate of the one after it.
        weight = rates[step + 1] ** 2
        weights += weight
        x = x + weight / weights * (z - x)
        np.testing.assert_allclose(params.up_DF, x, rtol=1e-5, atol=1e-6)
