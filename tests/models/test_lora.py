"""Low-rank updates: nothing at first, then what adding them to their matrices would give."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import train_step
from llm_jax import trees
from llm_jax import tuning
from llm_jax.models import build
from llm_jax.models import lora
from tests import helpers

ALL = config_lib.LoraConfig(rank=2, alpha=3.0, targets="*")

MODELS = {
    "llama": {},
    "bert": helpers.BERT,
    "t5": helpers.T5,
    "latents": helpers.LATENTS,
    "experts": helpers.EXPERTS,  # which have none: the dense layer and attention do
    "replicated_heads": {"num_heads": 6, "head_dim": 4, "vocab_size": 33, "mlp_dim": 48},
}


def _run(model, targets="*", **sections):
    updates = {"lora": dataclasses.replace(ALL, targets=targets)}
    return helpers.tiny_run_config(model | updates, **sections)


def _updates(model):
    return {name: leaf for name, leaf in trees.by_name(model).items() if "/lora/" in name}


@pytest.mark.parametrize("name", MODELS)
def test_updates_beside_matrices_are_updates_added_to_them(name):
    config = _run(MODELS[name])
    shape, choices = ((1, 1, 1, 1, 1), {})
    if name == "replicated_heads":  # two key heads on three devices, the queries of each split
        shape, choices = ((1, 1, 1, 1, 3), {"kv_heads": "replicated"})
    mesh, rules = helpers.make_mesh(shape, "fsdp_tp", **choices)
    model = helpers.random_model(config.model, mesh, rules)
    batch = helpers.place(helpers.random_batch(config), mesh, rules)
    with jax.set_mesh(mesh):
        merged = lora.merge(model, config.model, rules)
        plain = dataclasses.replace(config, model=lora.without(config.model))
        beside = jax.jit(lambda m: train_step.states(config, m, batch)[0])(model)
        added = jax.jit(lambda m: train_step.states(plain, m, batch)[0])(merged)
        base = jax.jit(
            lambda m: train_step.states(config, m, batch)[0],
        )(jax.tree_util.tree_map_with_path(_without_update, model))
    helpers.assert_close(beside, added, 2e-5)
    assert np.abs(np.asarray(added) - np.asarray(base)).max() > 0.1
    assert not _updates(merged) and _updates(model)


def _without_update(path, leaf):
    return 0 * leaf if "_up_" in trees.name_of(path) else leaf


def test_a_new_model_is_the_one_without_updates():
    config = _run({})
    mesh, rules = helpers.make_mesh()
    with jax.set_mesh(mesh):
        model = helpers.make_model(config.model, rules)
        plain = helpers.make_model(lora.without(config.model), rules)
        merged = lora.merge(model, config.model, rules)
    assert all(np.any(leaf) for name, leaf in _updates(model).items() if "_down_" in name)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)


def test_updates_alone_learn_and_have_moments():
    config = _run(helpers.T5, "attention/q,*/out")
    mesh, rules = helpers.make_mesh()
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: train_step.init_state(config, rules))()
        batch = helpers.place(helpers.random_batch(config), mesh, rules)
        step = jax.jit(lambda state: train_step.train_step(config, state, batch)[0])
        after = step(step(state))
    names = set(_updates(state.model))
    assert {name.split("/")[-3] + "/" + name.split("/")[-1] for name in names} == {
        "attention/q_down_DI",
        "attention/q_up_IKGC",
        *(f"{kind}/out_{x}" for kind in ("attention", "cross_attention") for x in _OUT),
        "mlp/out_down_FI",
        "mlp/out_up_ID",
    }
    before, now = (trees.by_name(s.model) for s in (state, after))
    for name, leaf in before.items():
        assert np.array_equal(leaf, now[name]) == (name not in names), name
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(before[name].size for name in names)


_OUT = ("down_KGCI", "up_ID")


def test_a_wide_matrix_has_no_gradient_in_the_program():
    """The point of the two narrow products: nothing of the matrix's size is computed for it."""
    config = _run({"embed_dim": 32, "head_dim": 12, "num_layers": 1}, "mlp/up")
    mesh, rules = helpers.make_mesh()
    with jax.set_mesh(mesh):
        model = build.abstract_model(config.model, rules)
        batch = jax.eval_shape(lambda: helpers.random_batch(config))
        made = {}
        for learn in ("", "*"):
            tuned = dataclasses.replace(config, tune=config_lib.TuneConfig(learn=learn))
            program = jax.make_jaxpr(
                lambda m, b, c=tuned: train_step.gradients(c, m, b, jax.random.key(0))[0]
            )
            # Types name where arrays lie: f32[32@data,128].
            lines = re.sub(r"@\w+", "", str(program(model, batch))).splitlines()
            products = [line.partition("=")[0] for line in lines if "dot_general" in line]
            # A product gives the gradient, which is then turned, or not.
            shapes = ("f32[32,128]", "f32[128,32]")
            made[learn] = [p for p in products if any(shape in p for shape in shapes)]
    assert not made[""] and made["*"]


def test_absorbed_weights_refuse_what_is_not_merged():
    updated = lora.Updated(np.ones((3, 2, 4)), np.ones((3, 1)), np.ones((1, 2, 4)), 1.0)
    for equation in ("BTHC,ZHC->BTHZ", "BTHZ,ZHC->BTHC"):
        with pytest.raises(ValueError, match="merge it"):
            lora.multiply(equation, np.ones((1, 1, 2, 3)), updated, jax.P(None, None, None, None))
    with pytest.raises(ValueError, match="merge it"):
        updated[0]


@pytest.mark.parametrize(
    "targets, said",
    [("attention/w", "attention/w"), ("mlp/upp", "did you mean 'mlp/up'"), ("*,qkv", "qkv")],
)
def test_targets_that_are_not_there_are_named(targets, said):
    config = _run({}, targets)
    mesh, rules = helpers.make_mesh()
    with jax.set_mesh(mesh):
        names = trees.by_name(build.abstract_model(config.model, rules))
    with pytest.raises(errors.UserError, match=said):
        tuning.check(config, names)


@pytest.mark.parametrize("field, value", [("rank", -1), ("alpha", 0.0), ("targets", " , ")])
def test_settings_are_checked(field, value):
    with pytest.raises(errors.UserError, match=f"model.lora.{field}"):
        helpers.tiny_run_config({"lora": dataclasses.replace(ALL, **{field: value})})
