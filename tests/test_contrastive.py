"""The contrastive loss: numpy's, with every other pair of the batch as a candidate, wherever it lies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import losses
from llm_jax import train_step
from tests import helpers

_TEMPERATURE = 0.1


def _unit(rng, *shape):
    x = rng.standard_normal(shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def _numpy_terms(first, second, weights):
    logits = first.astype(np.float64) @ second.astype(np.float64).T / _TEMPERATURE
    logits[:, weights == 0] = -np.inf
    log_z = np.log(np.exp(logits).sum(axis=1))
    return log_z - np.diag(logits)


@pytest.mark.parametrize("is_symmetric", [False, True])
def test_sums_equal_numpy(one_device, is_symmetric):
    rng = np.random.default_rng(0)
    first, second = _unit(rng, 6, 5), _unit(rng, 6, 5)
    weights = np.array([1, 1, 0, 2, 1, 0], np.float32)
    sums = jax.jit(
        functools.partial(
            losses.contrastive_sums, temperature=_TEMPERATURE, is_symmetric=is_symmetric
        )
    )(*map(jnp.asarray, (first, second, weights)))
    terms = _numpy_terms(first, second, weights)
    if is_symmetric:
        terms = (terms + _numpy_terms(second, first, weights)) / 2
    counted = weights > 0
    wanted = (terms[counted] * weights[counted]).sum()
    np.testing.assert_allclose(sums.cross_entropy, wanted, rtol=1e-5)
    assert float(sums.weight) == 5.0


def _pairs(config):
    """Returns a batch of rows with two texts of uneven lengths and some padding."""
    rng = np.random.default_rng(1)
    batch = helpers.random_batch(config)
    places = np.arange(config.data.sequence_length)[None]
    cuts, ends = rng.integers(2, 8, (8, 1)), rng.integers(10, 17, (8, 1))
    segments = np.where(places < cuts, 1, np.where(places < ends, 2, 0)).astype(np.int32)
    positions = np.where(segments == 2, places - cuts, np.where(segments == 1, places, 0))
    weights = np.array([1, 1, 1, 0, 1, 1, 2, 1], np.float32)
    targets = np.arange(8, dtype=np.int32)
    return batch._replace(
        segments=segments, positions=positions.astype(np.int32), weights=weights, targets=targets
    )


@functools.cache
def _gradients(shape, rules, pooling="mean"):
    model = helpers.BERT | {"head": "none", "pooling": pooling, "use_head_transform": False}
    model |= {"use_head_bias": False}
    config = helpers.tiny_run_config(model, objective={"name": "contrastive"})
    mesh, axis_rules = helpers.make_mesh(shape, rules)
    parameters = helpers.random_model(config.model, mesh, axis_rules)
    batch = helpers.place(_pairs(config), mesh, axis_rules)
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(train_step.gradients, config))
        grads, sums, _ = run(parameters, batch, jax.random.key(0))
    return jax.tree.leaves(jax.device_get(grads)), jax.device_get(sums)


def test_candidates_lie_on_all_devices():
    grads, sums = _gradients((1, 4, 1, 1, 2), "fsdp_tp")
    one_grads, one_sums = _gradients((1, 1, 1, 1, 1), "fsdp")
    helpers.assert_close(sums, one_sums)
    helpers.assert_close(grads, one_grads, 2e-5)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_a_text_is_embedded_as_if_it_were_alone(pooling):
    """The other text of its row, and padding, change nothing."""
    model = helpers.BERT | {"head": "none", "pooling": pooling, "use_head_transform": False}
    config = helpers.tiny_run_config(
        model | {"use_head_bias": False}, objective={"name": "contrastive"}
    )
    mesh, rules = helpers.make_mesh()
    parameters = helpers.random_model(config.model, mesh, rules)
    pairs = _pairs(config)

    @jax.jit
    def embed(parameters, batch, segment):
        x_BTD, _ = train_step.states(config, parameters, batch)
        own = jnp.where(batch.segments == segment, 1, 0)
        return parameters.embeddings(x_BTD, own, 1)

    with jax.set_mesh(mesh):
        together = embed(parameters, helpers.place(pairs, mesh, rules), 2)
        alone = {name: np.zeros_like(getattr(pairs, name)) for name in ("tokens", "token_types")}
        segments, positions = np.zeros_like(pairs.segments), np.zeros_like(pairs.positions)
        for row, own in enumerate(pairs.segments == 2):
            count = own.sum()
            for name, array in alone.items():
                array[row, :count] = getattr(pairs, name)[row, own]
            segments[row, :count], positions[row, :count] = 2, np.arange(count)
        batch = pairs._replace(**alone, segments=segments, positions=positions)
        apart = embed(parameters, helpers.place(batch, mesh, rules), 2)
    helpers.assert_close(together, apart)
    np.testing.assert_allclose(np.linalg.norm(together, axis=-1), 1.0, rtol=1e-5)
