"""The coordinate check: what a few steps do to activations does not depend on the width, or on the depth."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import optim
from llm_jax import train_step
from llm_jax import trees
from llm_jax.models import build
from llm_jax.models import parametrisation
from tests import helpers

WIDTHS = (32, 64, 128)
FAMILIES = {
    "decoder": ({"norm": "rmsnorm"}, "causal"),
    "encoder": (helpers.BERT | {"num_token_types": 0}, "mlm"),
    # T5's own scale of logits takes half of what the width does to them.
    "encoder_decoder": (helpers.T5 | {"scale_logits": False}, "seq2seq"),
}
_STEPS = 4


def _config(family, **model):
    own, objective = FAMILIES[family]
    # Heads of one width: more of them, as wide as the base's.
    heads = {"num_heads": model.get("embed_dim", 32) // 8, "num_kv_heads": None, "head_dim": 8}
    if family == "encoder_decoder":
        heads["num_decoder_layers"] = model.get("num_layers", 2)
    fields = own | heads | {"base_width": 32, "base_depth": 2, "init_stddev": 0.1} | model
    return helpers.tiny_run_config(
        fields,
        objective={"name": objective},
        optim={"learning_rate": 0.02, "warmup_steps": 0, "schedule": "constant"},
    )


@functools.cache
def _moved(family, steps, **model):
    """Returns by how much a few steps move the final states and the logits, as root mean squares."""
    config = _config(family, **model)
    mesh, rules = helpers.make_mesh((1, 1, 1, 1, 1), "fsdp")
    batch = helpers.place(helpers.random_batch(config, ragged=False), mesh, rules)

    @jax.jit
    def look(model, batch):
        x_BTD, _ = train_step.states(config, model, batch)
        return x_BTD, model.vocabulary_logits(x_BTD)

    with jax.set_mesh(mesh):
        state = jax.jit(lambda: train_step.init_state(config, rules))()
        before = jax.device_get(look(state.model, batch))
        step = jax.jit(functools.partial(train_step.train_step, config))
        for _ in range(steps):
            state, metrics = step(state, batch)
        after = jax.device_get(look(state.model, batch))
    moved = [float(np.sqrt(np.mean(np.square(a - b)))) for a, b in zip(after, before)]
    # States are as the head reads them: before its multiplier.
    multiplier = parametrisation.logit_multiplier(config.model)
    return moved[0] / (multiplier or 1.0), moved[1], float(metrics["train/loss"])


def _slope(values, sizes):
    """Returns the exponent of a power of the size that values follow."""
    return np.polyfit(np.log(sizes), np.log(values), 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["decoder", "encoder", pytest.param("encoder_decoder", marks=pytest.mark.long)]
)
def test_updates_move_logits_as_far_at_any_width(family):
    slopes = {}
    for name in ("standard", "mup"):
        moved = [_moved(family, _STEPS, embed_dim=width, parametrisation=name) for width in WIDTHS]
        states, logits, _ = zip(*moved)
        slopes[name] = _slope(states, WIDTHS), _slope(logits, WIDTHS)
    assert abs(slopes["mup"][0]) < 0.2 and abs(slopes["mup"][1]) < 0.25
    # Of the standard one logits grow with the width.
    assert slopes["standard"][1] > 0.4


@pytest.mark.slow
def test_updates_move_states_as_far_at_any_depth():
    depths = (2, 4, 8)
    how = {"embed_dim": 32, "parametrisation": "completep"}
    moved = [_moved("decoder", _STEPS, num_layers=depth, **how)[:2] for depth in depths]
    for values in zip(*moved):
        assert abs(_slope(values, depths)) < 0.25


def test_branches_are_divided_by_the_depth_over_the_bases():
    config = _config("decoder", num_layers=8, parametrisation="completep").model
    assert parametrisation.branch_multiplier(config, 8) == 0.25
    assert parametrisation.branch_multiplier(config, 2) is None
    deep, base = (dataclasses.replace(config, num_layers=depth) for depth in (8, 2))
    assert parametrisation.branch_stddev(deep) == parametrisation.branch_stddev(base)
    mup = dataclasses.replace(config, parametrisation="mup")
    assert parametrisation.branch_multiplier(mup, 8) is None
    assert parametrisation.branch_stddev(mup) == parametrisation.branch_stddev(base) / 2


@pytest.mark.parametrize("name", ["mup", "completep"])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_base_all_are_the_same(family, name):
    standard = _moved(family, 2, embed_dim=32)
    assert _moved(family, 2, embed_dim=32, parametrisation=name) == pytest.approx(standard)


def test_matrices_learn_at_a_rate_that_falls_with_the_width():
    config = _config("encoder", embed_dim=128, parametrisation="mup")
    mesh, rules = helpers.make_mesh((1, 1, 1, 1, 1), "fsdp")
    with jax.set_mesh(mesh):
        model = build.abstract_model(config.model, rules)
        factors = trees.by_name(parametrisation.rate_factors(config.model, model))
    for name in (
        "stack/layers/attention/q_DKGC",
        "stack/layers/mlp/out_FD",
        "head_transform/dense_DM",
    ):
        assert factors[name] == 0.25
    for name in ("embedding/table_VD", "stack/layers/mlp/up_bias_F", "head_bias_V", "position_PD"):
        assert factors[name] == 1.0


class _Params(NamedTuple):
    up_DF: object


def test_decay_is_that_of_the_base(one_device):
    """A step without a gradient takes the same share of weights at any width."""
    config = config_lib.OptimConfig(learning_rate=0.1, weight_decay=0.3)
    params, zeros = _Params(jnp.ones((4, 4))), _Params(jnp.zeros((4, 4)))
    optimizer = optim.make_optimizer(config, lambda step: 0.1, lambda tree: _Params(0.25))
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates.up_DF, -0.03, rtol=1e-6)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates.up_DF, -0.03 - 0.1 * 0.25, rtol=1e-5)


def test_wider_heads_have_smaller_scores():
    config = _config("decoder", embed_dim=128, parametrisation="mup").model
    wide = dataclasses.replace(config, head_dim=32, base_head_dim=8)
    assert parametrisation.attention_scale(config) == 8**-0.5
    assert parametrisation.attention_scale(wide) == 8**0.5 / 32
    assert (
        parametrisation.attention_scale(dataclasses.replace(wide, parametrisation="standard"))
        == 32**-0.5
    )


@pytest.mark.parametrize(
    ("model", "optim", "message"),
    [
        ({"moe": {"num_experts": 4}}, {}, "models with experts have 'standard'"),
        ({}, {"name": "muon"}, "is of adamw"),
        ({"parametrisation": "mupp"}, {}, "did you mean 'mup'"),
    ],
)
def test_what_it_is_not_made_for_is_refused(model, optim, message):
    raw = config_lib.to_dict(config_lib.RunConfig())
    raw["model"] |= {"parametrisation": "mup"} | {
        k: raw["model"][k] | v if isinstance(v, dict) else v for k, v in model.items()
    }
    raw["optim"] |= optim
    with pytest.raises(errors.UserError, match=message):
        config_lib.check(config_lib.from_dict(raw))
