"""What each remat policy keeps for the backward pass: without this, ignoring `remat` would go unseen."""

import jax
import pytest

from llm_jax import config as config_lib
from llm_jax import train_step
from tests import helpers

_DATA = {"batch_size": 2, "sequence_length": 24}


def _kept_bytes(remat, space=jax.memory.Space.Device):
    run = helpers.tiny_run_config({"remat": remat, "attention": "reference"}, data=_DATA)
    mesh, rules = helpers.make_mesh()
    model = helpers.random_model(run.model, mesh, rules)
    batch = helpers.place(helpers.random_batch(run), mesh, rules)

    def backward(model):
        return jax.vjp(lambda m: train_step.loss_sums(run, m, batch).cross_entropy, model)[1]

    def leaves(model):
        kept.extend(jax.typeof(leaf) for leaf in jax.tree.leaves(backward(model)))

    kept = []
    jax.eval_shape(leaves, model)
    return sum(x.size * x.dtype.itemsize for x in kept if x.memory_space == space)


@pytest.fixture(scope="module")
def kept():
    """Bytes on the device by policy."""
    with jax.set_mesh(helpers.make_mesh()[0]):
        return {remat: _kept_bytes(remat) for remat in config_lib.REMATS}


def test_policies_save_less_and_less(kept):
    order = ("offload", "full", "attention_output", "qkv", "dots", "none")
    assert set(order) == set(config_lib.REMATS)
    sizes = [kept[remat] for remat in order]
    assert sizes == sorted(set(sizes))


def test_what_is_named_is_what_is_kept(kept):
    config = helpers.tiny_model_config()
    number = 4 * _DATA["batch_size"] * _DATA["sequence_length"] * config.num_layers
    heads = config.num_heads + 2 * config.kv_heads
    assert kept["qkv"] - kept["full"] == number * heads * config.head_width
    with jax.set_mesh(helpers.make_mesh()[0]):
        on_host = _kept_bytes("offload", jax.memory.Space.Host)
    # What layers begin with, and what attention gives: heads are as wide together as the model.
    assert on_host == 2 * number * config.embed_dim
