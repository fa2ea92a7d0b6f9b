"""A search tries what divides, prunes what cannot fit, and gives overrides that make what it found."""

import dataclasses
import importlib
import math

import pytest

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.aot import topology
from llm_jax.plan import budgets
from llm_jax.plan import search

_ENTRY = budgets.Entry("llama_1b", "v5e:2x2")


@pytest.fixture(scope="module")
def tried():
    return list(search.candidates(_ENTRY.config(), _ENTRY.slice_name))


def test_each_candidate_is_another_and_uses_all_chips(tried):
    assert len({one.overrides for one in tried}) == len(tried)
    wanted = topology.parse(_ENTRY.slice_name)
    for one in tried:
        assert math.prod(one.config.mesh.shape) == wanted.num_chips
    remats = {one.config.model.remat for one in tried}
    assert remats == {"none", "dots", "qkv", "attention_output", "full"}
    assert {one.config.mesh.tensor for one in tried} == {1, 2, 4}
    assert {one.config.mesh.context for one in tried} == {"gather", "ring"}
    assert len({one.config.optim.accumulation_steps for one in tried}) > 3


def test_slices_are_replicas():
    for one in search.candidates(_ENTRY.config(), "2*v5e:2x2", remats=("full",)):
        assert one.config.mesh.replica == 2
        assert math.prod(one.config.mesh.shape) == 8


def test_batch_sizes_are_those_asked_for():
    some = search.candidates(_ENTRY.config(), "v5e:2x2", remats=("full",), batch_sizes=(32, 64))
    assert {one.config.data.batch_size for one in some} == {32, 64}


def test_overrides_make_the_candidate_of_the_config(tried, parse):
    path = importlib.import_module(f"configs.{_ENTRY.config_name}").__file__
    one = max(tried, key=lambda one: len(one.overrides))
    assert parse(f"--config={path}", *one.overrides.split()) == one.config


def test_what_cannot_fit_is_told_before_anything_is_compiled():
    config = budgets.Entry("llama_7b", "v5e:2x2").config()
    with pytest.raises(errors.UserError, match=r"nothing fits v5e:2x2.*GiB a chip; use a larger"):
        search.search(config, "v5e:2x2", num_compiled=1)


def test_what_does_not_divide_is_told():
    model = dataclasses.replace(config_lib.ModelConfig(), embed_dim=125, num_heads=5)
    config = dataclasses.replace(
        config_lib.RunConfig(model=model),
        data=config_lib.DataConfig(batch_size=7, sequence_length=9),
    )
    with pytest.raises(errors.UserError, match="no mesh of v5e:2x2 divides"):
        search.search(config, "v5e:2x2", num_compiled=1)
