"""A checkpoint loaded for generation lies as its heads allow."""

import logging

import jax
import pytest

from llm_jax import checkpoint
from llm_jax import errors
from llm_jax import train_step
from llm_jax.sampling import load
from tests import helpers


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two key-value heads with four queries each."""
    folder = str(tmp_path_factory.mktemp("run"))
    config = helpers.tiny_run_config({"num_heads": 8, "vocab_size": 260})
    mesh, rules = helpers.make_mesh()
    manager = checkpoint.Checkpoints(folder, config, {"kind": "bytes"})
    with jax.set_mesh(mesh):
        manager.save(jax.jit(lambda: train_step.init_state(config, rules))())
    manager.close()
    return folder


@pytest.mark.parametrize(
    "tensor, axes", [(1, ("tensor", None)), (2, ("tensor", None)), (4, (None, "tensor"))]
)
def test_key_heads_that_devices_do_not_divide_lie_on_each(workdir, tensor, axes, caplog):
    with caplog.at_level(logging.INFO, "llm_jax"):
        loaded = load.load(workdir, tensor=tensor)
    assert tuple(loaded.model.rules.act("KG")) == axes
    weight = loaded.model.blocks[0].attention.q_DKGC[...]
    assert tuple(weight.sharding.spec[1:3]) == axes
    is_said = "2 key-value heads on each of 4 devices" in caplog.text
    assert is_said == (tensor == 4)


def test_more_devices_than_either_are_refused(workdir):
    with pytest.raises(errors.UserError, match="num_kv_heads = 2: .* 8 ways .*tensor = 1 or 2$"):
        load.load(workdir, tensor=8)
