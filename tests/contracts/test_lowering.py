"""Every shipped config lowers one train step for the slice that it names, without any device."""

import dataclasses
import importlib
import pathlib

import jax
import pytest

from llm_jax import config as config_lib
from llm_jax import mesh as mesh_lib
from llm_jax import sharding
from llm_jax import train_step
from llm_jax.aot import steps
from llm_jax.aot import topology

NAMES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py")
    if path.stem != "__init__"
)


def _spec(leaf):
    return jax.sharding.PartitionSpec() if leaf.sharding is None else leaf.sharding.spec


def _config(name):
    return config_lib.from_config_dict(importlib.import_module(f"configs.{name}").get_config(""))


def _assert_lowers(config, num_chips):
    mesh = mesh_lib.make_abstract(config.mesh, num_chips)
    sharding.check(config, mesh)
    batch = steps.abstract_batch(config, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        state = steps.abstract_state(config)
        new_state, metrics = jax.eval_shape(
            lambda state, batch: train_step.train_step(config, state, batch), state, batch
        )
    assert metrics["train/loss"].shape == ()
    updated = dict(jax.tree_util.tree_flatten_with_path(new_state)[0])
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        assert updated[path].shape == leaf.shape, path
        assert _spec(updated[path]) == _spec(leaf), path


@pytest.mark.parametrize("name", NAMES)
def test_config_lowers_for_its_slice(name):
    config = _config(name)
    is_cpu = config.slice == "cpu"
    _assert_lowers(config, 1 if is_cpu else topology.parse(config.slice).num_chips)


@pytest.mark.parametrize("name", NAMES)
def test_config_lowers_for_256_chips(name):
    """64 ways FSDP, 4 ways tensor parallel, a row for each of the 64; FSDP alone where heads are odd."""
    config = _config(name)
    model = config.model
    kv_heads = sharding.fitting_kv_heads(model, 4)
    heads = model.kv_heads if kv_heads == "sharded" else model.num_heads // model.kv_heads
    tensor = 4 if heads % 4 == 0 else 1
    assert tensor == 4 or name == "smollm2_135m"
    rows = 256 // tensor * config.optim.accumulation_steps
    mesh = config_lib.MeshConfig(tensor=tensor, rules="fsdp_tp", kv_heads=kv_heads)
    if tensor == 1:  # a width of 576 is divided 64 ways, not 256
        mesh = config_lib.MeshConfig(replica=4, rules="fsdp")
    config = dataclasses.replace(
        config,
        mesh=mesh,
        data=dataclasses.replace(config.data, batch_size=rows),
    )
    _assert_lowers(config, 256)


@pytest.mark.parametrize("name", NAMES)
def test_config_says_what_it_is_for(name):
    docstring = importlib.import_module(f"configs.{name}").__doc__
    assert f"--config=configs/{name}.py" in docstring
    assert "Slice: " in docstring
    assert "Expected: " in docstring
