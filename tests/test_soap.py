"""SOAP by its paper, and what it promises."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import config as config_lib
from llm_jax import optim


class Matrix(NamedTuple):
    """Names end in letters, as those of a model do."""

    up_DF: jax.Array


def _optimizer(name="soap", **changes):
    config = config_lib.OptimConfig(name=name, learning_rate=1.0, weight_decay=0.0, **changes)
    return optim.make_optimizer(config, optax.constant_schedule(1.0))


def _soap(grads, **changes):
    """Returns the updates of SOAP for gradients, one after the other."""
    optimizer = _optimizer(**changes)
    params = Matrix(jnp.zeros(grads[0].shape))
    state, update, found = optimizer.init(params), jax.jit(optimizer.update), []
    for grad in grads:
        updates, state = update(Matrix(jnp.asarray(grad, jnp.float32)), state, params)
        found.append(np.asarray(updates.up_DF))
    return found


def _gradients(count=12, shape=(5, 8), seed=0):
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal(shape)
    return [shared + rng.standard_normal(shape) for _ in range(count)]


def test_soap_of_sides_too_wide_is_adam(one_device):
    grads = _gradients()
    adam = _optimizer("adamw")
    params = Matrix(jnp.zeros((5, 8)))
    state = adam.init(params)
    for grad, own in zip(grads, _soap(grads, soap_max_width=4), strict=True):
        updates, state = adam.update(Matrix(jnp.asarray(grad, jnp.float32)), state, params)
        np.testing.assert_allclose(own, updates.up_DF, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_width", [8, 5])  # both sides, the narrow one alone
def test_soap_is_adam_in_the_eigenbases_of_its_paper(one_device, max_width):
    """Algorithms 3 and 4 of Vyas et al. 2024 in NumPy; the first update is Adam's own."""
    b1, b2, epsilon, every = 0.9, 0.95, 1e-8, 3
    grads = _gradients()
    left, right = np.zeros((5, 5)), np.zeros((8, 8))
    q_left, q_right = np.eye(5), np.eye(8)
    mean, variance = np.zeros((5, 8)), np.zeros((5, 8))
    found = _soap(grads, soap_every=every, soap_max_width=max_width)
    for step, (grad, own) in enumerate(zip(grads, found, strict=True)):
        mean = b1 * mean + (1 - b1) * grad
        rotated = q_left.T @ grad @ q_right
        variance = b2 * variance + (1 - b2) * rotated**2
        adam = (q_left.T @ mean @ q_right) / (1 - b1 ** (step + 1))
        adam /= np.sqrt(variance / (1 - b2 ** (step + 1))) + epsilon
        wanted = -q_left @ adam @ q_right.T
        # Where the first gradient says nothing, of eight directions five, any basis is as good as another.
        is_told = max_width == 5 or step == 0
        if is_told:
            np.testing.assert_allclose(own, wanted, rtol=2e-3, atol=2e-4)
        assert np.sum(own * wanted) > 0.8 * np.linalg.norm(own) * np.linalg.norm(wanted)
        left = b2 * left + (1 - b2) * grad @ grad.T
        right = b2 * right + (1 - b2) * grad.T @ grad
        if step % every == 0:
            order = np.argsort(-np.diag(q_left.T @ left @ q_left))
            q_left, variance = np.linalg.qr(left @ q_left[:, order])[0], variance[order]
            if max_width == 8:
                order = np.argsort(-np.diag(q_right.T @ right @ q_right))
                q_right = np.linalg.qr(right @ q_right[:, order])[0]
                variance = variance[:, order]
            if step == 0:
                variance = (1 - b2) * (q_left.T @ grad @ q_right) ** 2


def test_soap_does_not_see_the_axes_once_its_bases_are_found(one_device):
    """Turned gradients have turned updates in the end, but not at first, when bases are the axes."""
    rng = np.random.default_rng(1)
    u_DD, v_FF, w_DD, x_FF = (np.linalg.qr(rng.standard_normal((6, 6)))[0] for _ in range(4))
    grad = w_DD @ np.diag(0.5 ** np.arange(6)) @ x_FF
    # A larger epsilon: Adam divides what is zero but for rounding by it.
    plain, turned = (
        _soap([one] * 40, soap_every=1, epsilon=1e-3) for one in (grad, u_DD @ grad @ v_FF.T)
    )
    errors = [
        np.abs(u_DD @ own @ v_FF.T - other).max() for own, other in zip(plain, turned, strict=True)
    ]
    assert errors[0] > 0.1 and errors[-1] < 0.01
    # In the eigenbases of one gradient Adam is the sign of its singular values.
    np.testing.assert_allclose(-w_DD.T @ plain[-1] @ x_FF.T, np.eye(6), atol=0.05)


def test_soap_takes_layers_and_heads_as_matrices_of_their_own(one_device):
    class Weights(NamedTuple):
        k_DKC: jax.Array
        up_DF: jax.Array

    rng = np.random.default_rng(0)
    grads = [rng.standard_normal((2, 6, 2, 4)) for _ in range(4)]
    optimizer = _optimizer(soap_every=2)
    params = Weights(jnp.zeros((2, 6, 2, 4)), jnp.zeros((6, 8)))
    state = optimizer.init(params)
    for grad in grads:
        given = Weights(jnp.asarray(grad, jnp.float32), jnp.asarray(grad[1].reshape(6, 8)))
        updates, state = optimizer.update(given, state, params)
        np.testing.assert_allclose(
            updates.k_DKC[1].reshape(6, 8), updates.up_DF, rtol=1e-4, atol=1e-5
        )
