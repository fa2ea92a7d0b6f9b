"""Multi-head latent attention: its equations, what may not change them, and what a cache has to hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import optim
from llm_jax import train_step
from llm_jax.models import positions
from llm_jax.sampling import cache as cache_lib
from tests import helpers
from tests.models import oracle

LENGTH = 12
_NO_QUERY_LATENT = helpers.LATENTS | {"q_latent_dim": None}


def _tokens():
    tokens = np.random.default_rng(0).integers(0, helpers.TINY.vocab_size, (2, LENGTH))
    return tokens.astype(np.int32)


def _logits(model, tokens_BT):
    with jax.set_mesh(helpers.make_mesh()[0]):
        positions_BT = jnp.broadcast_to(jnp.arange(LENGTH), tokens_BT.shape)
        return np.asarray(jax.jit(lambda m, *a: m(*a))(model, jnp.asarray(tokens_BT), positions_BT))


@pytest.mark.parametrize(
    "changes",
    [
        helpers.LATENTS,
        _NO_QUERY_LATENT,
        helpers.LATENTS | {"rope_interleave": True},
        {"num_kv_heads": None, "kv_latent_dim": 6},
        helpers.LATENTS
        | {"rope_scaling": "yarn", "rope_scaling_factor": 4.0, "rope_original_length": 16},
    ],
    ids=["latents", "no_query_latent", "interleaved", "default_widths", "yarn"],
)
def test_equals_the_papers_equations(changes):
    config = helpers.tiny_model_config(**changes)
    model, tokens_BT = helpers.random_model(config, *helpers.make_mesh()), _tokens()
    options = {"is_interleaved": config.rope_interleave}
    if config.rope_scaling == "yarn":  # of which test_positions.py has the formula
        options["frequencies"] = positions.rotary_frequencies(config).astype(np.float64)
        options["factor"] = 0.1 * np.log(4.0) + 1.0
    logits_BTV, weights = _logits(model, tokens_BT), oracle.weights_of(model)
    for row, logits_TV in zip(tokens_BT, logits_BTV):
        helpers.assert_close(
            logits_TV, oracle.latent_llama(weights, row, config.num_layers, **options)
        )


@functools.cache
def _gradients(**changes):
    """Returns loss and gradients of a model that has dropout on."""
    dropout = {"dropout": 0.2, "attention_dropout": 0.1}
    data = {"batch_size": 4, "sequence_length": LENGTH}
    run = helpers.tiny_run_config(helpers.LATENTS | dropout | changes, data=data)
    mesh, rules = helpers.make_mesh()
    model = helpers.random_model(run.model, mesh, rules)
    batch = helpers.place(helpers.random_batch(run), mesh, rules)

    def loss(model, batch, key):
        sums = train_step.loss_sums(run, model, batch, key)
        return sums.cross_entropy / sums.weight

    with jax.set_mesh(mesh):
        run_it = jax.jit(jax.value_and_grad(loss))
        value, grads = jax.device_get(run_it(model, batch, jax.random.key(3)))
    return value, jax.tree.leaves(grads)


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_layers": False},
        {"remat": "full"},
        {"remat": "dots"},
        {"remat": "qkv"},
        {"remat": "attention_output"},
        {"remat": "offload"},
        {"attention": "chunked", "attention_chunk": 5},
        {"attention": "pallas"},
    ],
    ids=str,
)
def test_same_loss_and_gradients(changes):
    loss, grads = _gradients(**changes)
    plain_loss, plain_grads = _gradients(attention="reference")
    helpers.assert_close(loss, plain_loss)
    helpers.assert_close(grads, plain_grads, 2e-5)
    assert all(np.abs(grad).max() > 0 for grad in grads)


def test_a_cache_holds_a_latent_and_a_rotated_key_of_each_token(one_device):
    config = helpers.tiny_model_config(**helpers.LATENTS)
    cache = cache_lib.make_cache(config, helpers.make_mesh()[1], batch_size=3, num_slots=5)
    sizes = [leaf.size for leaf in jax.tree.leaves(cache)]
    assert sizes == [3 * 5 * (config.kv_latent_dim + config.rope_head_dim)] * config.num_layers


def test_position_is_in_the_rotated_part_alone():
    """Without it the order of what came before does not show in one layer."""
    changes = helpers.LATENTS | {"num_layers": 1}
    model = helpers.random_model(helpers.tiny_model_config(**changes), *helpers.make_mesh())
    tokens_BT = _tokens()
    swapped_BT = tokens_BT[:, [1, 0, *range(2, LENGTH)]]

    def without(path, leaf):
        return 0 * leaf if "rope" in jax.tree_util.keystr(path) else leaf

    unrotated = jax.tree_util.tree_map_with_path(without, model)
    for one, is_ordered in ((model, True), (unrotated, False)):
        change = _logits(one, tokens_BT) - _logits(one, swapped_BT)
        assert (np.abs(change[:, 2:]).max() > 1e-3) == is_ordered


def test_muon_and_decay_take_its_matrices():
    for changes in (helpers.LATENTS, _NO_QUERY_LATENT):
        model = helpers.random_model(helpers.tiny_model_config(**changes), *helpers.make_mesh())
        attention = model.stack.layers.attention
        labels, decayed = optim.muon_labels(attention), optim.decay_mask(attention)
        for leaf, label, is_decayed in zip(*map(jax.tree.leaves, (attention, labels, decayed))):
            is_matrix = leaf.ndim > 2  # of layers
            assert (label == "muon", is_decayed) == (is_matrix, is_matrix)
