"""A checkpoint loaded for generation lies as its heads allow."""

import logging

import jax
import pytest

from llm_jax import checkpoint
from llm_jax import errors
from llm_jax import train_step
from llm_jax.sampling import beams
from llm_jax.sampling import generate
from llm_jax.sampling import load
from llm_jax.sampling import samplers
from tests import helpers


def _save(folder: str, model: dict, **sections) -> str:
    config = helpers.tiny_run_config({"vocab_size": 260} | model, **sections)
    mesh, rules = helpers.make_mesh()
    manager = checkpoint.Checkpoints(folder, config, {"kind": "bytes"})
    with jax.set_mesh(mesh):
        manager.save(jax.jit(lambda: train_step.init_state(config, rules))())
    manager.close()
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two key-value heads with four queries each."""
    return _save(str(tmp_path_factory.mktemp("run")), {"num_heads": 8})


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


def test_an_encoder_decoder_writes(tmp_path):
    workdir = _save(str(tmp_path), helpers.T5, objective={"target_length": 8})
    loaded = load.load(workdir, tensor=2)
    assert loaded.is_encoder_decoder
    prompts = [generate.Prompt("a source"), generate.Prompt("another")]
    how = {"max_tokens": 5, "beams": beams.BeamParams(num_beams=2), "num_samples": 2}
    completions = list(generate.generate(loaded, prompts, samplers.SamplingParams(), **how))
    assert [(c.prompt, c.sample) for c in completions] == [
        *(("a source", 0), ("a source", 1)),
        *(("another", 0), ("another", 1)),
    ]
    for best, other in zip(completions[::2], completions[1::2]):
        assert best.score > other.score
        assert {best.num_tokens, other.num_tokens} <= {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    "model, objective",
    [(helpers.BERT, {"name": "mlm"}), ({"head": "sequence"}, {"name": "sequence"})],
)
def test_a_model_that_writes_nothing_is_refused(model, objective, tmp_path):
    workdir = _save(str(tmp_path), model, objective=objective)
    with pytest.raises(errors.UserError, match="holds a model that writes no text .*takes a dec"):
        load.load(workdir)
