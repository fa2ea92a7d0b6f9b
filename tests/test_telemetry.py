"""What telemetry says is what plain arithmetic finds, and a run that is looked at learns the same."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import telemetry
from llm_jax import train
from llm_jax import train_step
from llm_jax import trees
from llm_jax.understanding import recording
from tests import helpers

FAMILIES = {
    "decoder": {"use_qk_norm": True, "attention_softcap": 3.0},
    "encoder": helpers.BERT | {"head": "sequence"},
    "encoder_decoder": helpers.T5,
}
OBJECTIVES = {"decoder": "causal", "encoder": "sequence", "encoder_decoder": "seq2seq"}


def _observed(family, **optim):
    config = helpers.tiny_run_config(
        FAMILIES[family], objective={"name": OBJECTIVES[family]}, optim=optim
    )
    mesh, rules = helpers.make_mesh((1, 4, 1, 1, 2), "fsdp_tp")
    batch = helpers.place(helpers.random_batch(config), mesh, rules)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: train_step.init_state(config, rules))()
        found = jax.device_get(telemetry.make(config)(state, batch))
        return config, mesh, state, batch, found


@pytest.mark.parametrize(
    "family", ["decoder", "encoder", pytest.param("encoder_decoder", marks=pytest.mark.long)]
)
def test_each_layer_is_looked_at(family):
    config, mesh, state, batch, found = _observed(family)
    layers = config.model.num_layers
    if family == "encoder_decoder":
        layers += config.model.decoder_layers
    for name in ("max_attention_logit", "activation_rms", "gradient_rms", "update_ratio"):
        assert found[f"telemetry/{name}"].shape == (layers,)
    assert ("telemetry/output_logit_norm" in found) == (config.model.head == "lm")
    assert all(np.all(np.isfinite(value)) for value in found.values())


def test_the_step_is_the_one_that_is_taken():
    config, mesh, state, batch, found = _observed("decoder")
    before = jax.device_get(trees.by_name(state.model))
    with jax.set_mesh(mesh):
        grads, _, _ = jax.jit(lambda m, b: train_step.gradients(config, m, b, jax.random.key(0)))(
            state.model, batch
        )
        after, _ = train_step.make_train_step(config)(state, batch)
    after, grads = (jax.device_get(trees.by_name(x)) for x in (after.model, grads))
    for layer in range(config.model.num_layers):
        own = [name for name in before if name.startswith("stack/layers/")]
        change = np.concatenate([np.ravel(after[n][layer] - before[n][layer]) for n in own])
        size = np.concatenate([np.ravel(before[n][layer]) for n in own])
        gradient = np.concatenate([np.ravel(grads[n][layer]) for n in own])
        ratio = np.linalg.norm(change) / np.linalg.norm(size)
        np.testing.assert_allclose(found["telemetry/update_ratio"][layer], ratio, rtol=1e-3)
        rms = np.sqrt(np.mean(np.square(gradient)))
        np.testing.assert_allclose(found["telemetry/gradient_rms"][layer], rms, rtol=1e-4)


def test_the_largest_logit_is_that_behind_the_weights():
    config, mesh, state, batch, found = _observed("decoder")
    largest = found["telemetry/max_attention_logit"]
    assert np.all(largest <= config.model.attention_softcap)
    with jax.set_mesh(mesh):
        weights = jax.jit(
            lambda model, batch: [
                one.weights_BKGTS for one in recording.record(config, model, batch)[1]
            ]
        )(state.model, batch)
    for layer, own in enumerate(jax.device_get(weights)):
        # A query's weights tell its logits up to a constant, whose size the largest one bounds.
        seen = own.max(-1) / np.where(own > 0, own, np.inf).min(-1)
        assert np.log(seen[np.isfinite(seen)].max()) <= 2 * config.model.attention_softcap
        assert largest[layer] > 0


def test_the_noise_scale_is_that_of_the_gradients_of_halves():
    config, mesh, state, batch, found = _observed("decoder")

    def gradient(rows):
        def one(model, batch):
            half = jax.tree.map(lambda x: x[rows], batch)
            return train_step.gradients(config, model, half, jax.random.key(0))[0]

        with jax.set_mesh(mesh):
            leaves = jax.tree.leaves(jax.device_get(jax.jit(one)(state.model, batch)))
        return np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(np.float64)

    halves = [gradient(slice(i, None, 2)) for i in (0, 1)]
    size = len(batch.tokens)
    small = np.mean([half @ half for half in halves])
    whole = np.mean(halves, axis=0)
    big = whole @ whole
    signal = 2 * big - small
    wanted = (small - big) * size / max(signal, 1e-30)
    np.testing.assert_allclose(found["telemetry/gradient_noise_scale"], wanted, rtol=1e-3)


def test_a_run_that_is_looked_at_learns_the_same(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be " * 400)
    config = config_lib.RunConfig(
        model=dataclasses.replace(helpers.TINY, vocab_size=256),
        data=config_lib.DataConfig(
            source=f"text:{tmp_path}/text.txt",
            cache_dir=str(tmp_path / "cache"),
            sequence_length=16,
            batch_size=8,
        ),
        train=config_lib.TrainConfig(num_steps=6, eval_every=0, log_every=2),
        optim=config_lib.OptimConfig(warmup_steps=1),
        compilation_cache="",
    )
    losses = {}
    for every in (0, 4):
        own = dataclasses.replace(
            config, train=dataclasses.replace(config.train, telemetry_every=every)
        )
        train.train(own, str(tmp_path / f"run{every}"))
        rows = (tmp_path / f"run{every}" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(row) for row in rows]
        losses[every] = [row["train/loss"] for row in rows]
        looked = [row["step"] for row in rows if "telemetry/log_z" in row]
        assert looked == ([4] if every else [])
    assert losses[0] == losses[4]


def test_steps_that_are_not_logged_are_refused():
    config = config_lib.RunConfig(train=config_lib.TrainConfig(telemetry_every=15, log_every=10))
    with pytest.raises(ValueError, match="telemetry_every"):
        config_lib.check(config)


def test_scores_that_nobody_sees_do_not_count(one_device):
    from llm_jax.kernels.flash_attention import masks
    from llm_jax.kernels.flash_attention import op

    q = jnp.zeros((1, 3, 1, 1, 2)).at[0, 0].set(1.0)
    k = jnp.zeros((1, 3, 1, 2)).at[0, 2].set(100.0)
    mask = masks.causal()
    found = jax.jit(lambda q, k: op.largest_score(q, k, mask=mask, scale=1.0))(q, k)
    assert (
        float(found) == 0.0
    )  # the first query, which alone would score 200, does not see the last key
