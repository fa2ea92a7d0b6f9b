"""Steps with experts: what is minimised, what is reported, and what moves without a gradient."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import metrics
from llm_jax import train_step
from llm_jax.models.moe import balance
from tests import commands
from tests import helpers

E = 4


def _run(model=None, moe=None, **sections) -> config_lib.RunConfig:
    changes = {"num_experts": E, "experts_per_token": 2, "balance_over": "sequence"} | (moe or {})
    model = {"num_layers": 3, "moe": config_lib.MoeConfig(**changes)} | (model or {})
    return helpers.tiny_run_config(model, **sections)


def _place(batch):
    return helpers.place(batch, *helpers.make_mesh())


def _gradients(config):
    model = helpers.random_model(config.model, *helpers.make_mesh())
    batch = _place(helpers.random_batch(config))
    run = jax.jit(functools.partial(train_step.gradients, config))
    return jax.device_get(run(model, batch, jax.random.key(0)))


def _step(config, state=None):
    rules = helpers.make_mesh()[1]
    if state is None:
        state = jax.jit(lambda: train_step.init_state(config, rules))()
    step = jax.jit(functools.partial(train_step.train_step, config))
    return step(state, _place(helpers.random_batch(config)))


def _routers(model):
    return model.stack.expert_layers.mlp.router


@pytest.mark.parametrize("stack", ["", pytest.param("encoder", marks=pytest.mark.long)])
def test_accumulation_equals_one_batch(one_device, stack):
    model = helpers.T5 if stack else {}
    moe = {"router_z_loss": 0.1, "balance_loss": 0.3, "stacks": stack or "all"}
    grads, sums, routed = _gradients(_run(model, moe))
    micro = _run(model, moe, optim={"accumulation_steps": 4})
    micro_grads, micro_sums, micro_routed = _gradients(micro)
    helpers.assert_close(
        (micro_sums.cross_entropy, micro_sums.weight), (sums.cross_entropy, sums.weight)
    )
    helpers.assert_close(micro_grads, grads, 2e-5)
    assert list(routed) == [stack]
    names = ("load_E", "num_tokens", "num_dropped")
    for name in names:
        helpers.assert_equal(getattr(micro_routed[stack], name), getattr(routed[stack], name))
    helpers.assert_close(
        balance.metrics(micro_routed[stack], stack, 4), balance.metrics(routed[stack], stack, 1)
    )


def test_losses_of_routers_are_minimised_and_not_reported(one_device):
    """The gradient is that of the cross-entropy and each layer's losses; the loss shown has none of these."""
    moe = {"balance_loss": 0.5, "router_z_loss": 0.2}
    config, plain = _run(moe=moe), _run(moe={"balance_loss": 0.0})
    grads, sums, routed = _gradients(config)
    plain_grads, plain_sums, plain_routed = _gradients(plain)
    helpers.assert_equal(sums, plain_sums)
    assert not plain_routed[""].loss.any()
    own = routed[""]
    wanted = 0.5 * own.balance + 0.2 * own.z_squared / own.num_tokens
    helpers.assert_close(own.loss, wanted)

    model = helpers.random_model(config.model, *helpers.make_mesh())
    batch = _place(helpers.random_batch(config))

    def of_routers(model):
        _, routed = train_step.states(config, model, batch, jax.random.key(0))
        return jnp.sum(routed[""].loss)

    extra = jax.device_get(jax.jit(jax.grad(of_routers))(model))
    sums = [x + y for x, y in zip(jax.tree.leaves(plain_grads), jax.tree.leaves(extra))]
    helpers.assert_close(jax.tree.leaves(grads), sums, 2e-5)
    _, shown = _step(config)
    _, plain_shown = _step(plain)
    helpers.assert_close(shown["train/loss"], plain_shown["train/loss"])


# schedule_free is refused with experts (tests/test_config_checks.py).
@pytest.mark.parametrize("optimizer", sorted({*config_lib.OPTIMIZERS} - {"schedule_free"}))
def test_selection_biases_move_by_load_alone(one_device, optimizer):
    moe = {"router": "sigmoid", "use_selection_bias": True, "selection_bias_rate": 0.25}
    config = _run(moe=moe, optim={"name": optimizer, "learning_rate": 0.1, "warmup_steps": 0})
    state, shown = _step(config)
    load = np.asarray(shown["moe/layers/load"])
    wanted = -0.25 * np.sign(load - load.mean(axis=1, keepdims=True))
    helpers.assert_close(_routers(state.model).selection_bias_E[...], wanted)
    assert np.any(_routers(state.model).router_DE[...])


def test_penalty_of_relu_follows_how_many_experts_tokens_have(one_device):
    config = _run(moe={"router": "relu", "relu_penalty_rate": 2.0})
    state, shown = _step(config)
    used = np.asarray(shown["moe/layers/experts_per_token"])
    helpers.assert_close(
        _routers(state.model).penalty_[...], balance.FIRST_PENALTY * 2.0 ** np.sign(used - 2)
    )


def test_a_skipped_update_leaves_biases_where_they_were(one_device):
    moe = {"router": "sigmoid", "use_selection_bias": True}
    config = _run(moe=moe, train={"on_nonfinite": "skip"}, optim={"learning_rate": 1e38})
    state, _ = _step(config)
    state, shown = _step(config, state)
    before = _routers(state.model).selection_bias_E[...]
    after, shown = _step(config, state)
    assert int(shown["train/num_skipped"]) > 0
    helpers.assert_equal(_routers(after.model).selection_bias_E[...], before)


def test_every_layer_is_reported(one_device):
    config = _run(helpers.T5 | {"num_layers": 2, "num_decoder_layers": 3})
    _, shown = _step(config)
    for stack, num_layers in (("encoder", 2), ("decoder", 3)):
        loads = np.asarray(shown[f"moe/{stack}/layers/load"])
        assert loads.shape == (num_layers, E)
        helpers.assert_close(loads.sum(1), np.ones(num_layers))
        for name in (
            "max_violation",
            "load_entropy",
            "dead_experts",
            "drop_fraction",
            "confidence",
        ):
            values = np.asarray(shown[f"moe/{stack}/layers/{name}"])
            assert values.shape == (num_layers,)
            helpers.assert_close(shown[f"moe/{stack}/{name}"], values.mean())
        assert shown[f"moe/{stack}/experts_per_token"] == 2.0


def test_evaluation_draws_and_balances_nothing(one_device):
    config = _run(moe={"router": "base", "experts_per_token": 1})
    model = helpers.random_model(config.model, *helpers.make_mesh())
    batch = _place(helpers.random_batch(config))
    _, trained = jax.jit(lambda: train_step.states(config, model, batch, jax.random.key(0)))()
    _, evaluated = jax.jit(lambda: train_step.states(config, model, batch))()
    assert balance.max_violation(trained[""].load_E).max() < 1e-6
    assert balance.max_violation(evaluated[""].load_E).max() > 0.1


@pytest.mark.slow
def test_commands_train_resume_and_sample(tmp_path):
    """A run of experts by the same commands, resumed, writes the metrics of each layer and then text."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    config = {
        "data.source": f"text:{tmp_path}/text.txt",
        "data.cache_dir": str(tmp_path / "cache"),
        "data.batch_size": 4,
        "data.sequence_length": 32,
        "model.num_layers": 2,
        "model.embed_dim": 32,
        "model.num_heads": 2,
        "model.moe.num_experts": E,
        "model.moe.router": "sigmoid",
        "model.moe.use_selection_bias": True,
        "train.eval_every": 0,
        "train.log_every": 1,
        "optim.warmup_steps": 1,
    }
    given = [f"--config.{name}={value}" for name, value in config.items()]
    run = [f"--config={commands.ROOT}/configs/tiny.py", f"--workdir={tmp_path}/run", *given]
    first = [*run, "--config.train.num_steps=2"]
    second = [*run, "--config.train.num_steps=4"]
    for code, _, log in commands.run("llm_jax.train", tmp_path, [first, second]):
        assert code == 0, log
    rows = metrics.read(tmp_path / "run")
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert np.shape(rows[-1]["moe/layers/load"]) == (2, E)
    assert json.dumps(rows[-1])
    flags = [f"--workdir={tmp_path}/run", "--prompt=the quick", "--max_tokens=4"]
    ((code, text, log),) = commands.run("llm_jax.sampling.__main__", tmp_path, [flags])
    assert code == 0 and text.startswith("the quick"), log


# --- what will not do -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moe, model, message",
    [
        ({"router": "expert_choice"}, {}, "a decoder would learn from the future"),
        ({"router": "soft"}, helpers.T5, "moe.stacks = 'encoder'"),
        ({"router": "switch"}, {}, "gives each token 1"),
        ({"experts_per_token": 5}, {}, "there are num_experts = 4"),
        ({"num_experts": 1, "experts_per_token": 1}, {}, "use 2 or more"),
        ({"num_groups": 3}, {}, "it must divide num_experts = 4"),
        ({"num_groups": 4, "groups_per_token": 1}, {}, "must hold experts_per_token"),
        ({"num_groups": 4, "router": "sigmoid", "groups_per_token": 4}, {}, "two best experts"),
        ({"jitter": 0.1}, {}, "it is for router switch"),
        ({"first_dense_layers": 3}, {}, "leave none of the decoder's 3 layers experts"),
        ({"every": 0}, {}, "at least 1"),
        ({"router": "sofmax"}, {}, "did you mean 'softmax'"),
        ({"capacity_factor": 0.0}, {}, "above 0"),
    ],
)
def test_contradictions_are_told(moe, model, message):
    with pytest.raises(errors.UserError, match=message):
        _run(model, moe)


def test_mixtures_of_packed_documents_are_refused():
    with pytest.raises(errors.UserError, match="use concat for texts"):
        _run({"architecture": "encoder"}, {"router": "soft"}, objective={"name": "mlm"})
    config = _run(
        {"architecture": "encoder"},
        {"router": "soft"},
        objective={"name": "mlm"},
        data={"packing": "concat"},
    )
    ring = dataclasses.replace(config.mesh, context="ring")
    moe = dataclasses.replace(config.model.moe, router="softmax", dispatch="capacity")
    model = dataclasses.replace(config.model, moe=moe)
    with pytest.raises(errors.UserError, match="use sorted"):
        config_lib.check(dataclasses.replace(config, model=model, mesh=ring))
