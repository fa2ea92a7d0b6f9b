"""Private gradients are the ordinary ones but for clipping and noise, and both are what is said of them."""

import dataclasses
import itertools
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
from optax import contrib
import pytest

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import private_gradients
from llm_jax import train
from llm_jax import train_step
from tests import helpers

FAMILIES = {
    "decoder": ({"num_layers": 1}, "causal"),
    "labels": (helpers.BERT | {"head": "sequence", "num_labels": 3}, "sequence"),
    "encoder_decoder": (helpers.T5, "seq2seq"),
}


def _config(family="decoder", **optim):
    model, objective = FAMILIES[family]
    packing = "concat" if objective == "causal" else "none"
    return helpers.tiny_run_config(
        model, objective={"name": objective}, data={"packing": packing}, optim=optim
    )


def _gradients(config, shape=(1, 1, 1, 1, 1), rules="fsdp", batch=None):
    mesh, rules = helpers.make_mesh(shape, rules)
    model = helpers.random_model(config.model, mesh, rules)
    batch = helpers.random_batch(config, ragged=False) if batch is None else batch
    with jax.set_mesh(mesh):
        run = jax.jit(lambda *args: train_step.gradients(config, *args)[:2])
        return jax.device_get(run(model, helpers.place(batch, mesh, rules), jax.random.key(3)))


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_without_clipping_and_noise_it_is_the_ordinary_gradient(family):
    batch = helpers.random_batch(_config(family), ragged=False)
    # Labels of rows have weights of their own, which a row's mean does not have.
    batch = batch._replace(weights=np.ones_like(batch.weights))
    wanted = _gradients(_config(family), batch=batch)
    private = _config(family, dp_clip_norm=1e6, dp_noise_multiplier=0.0)
    # Cut over devices, weights and rows both.
    found = _gradients(private, (2, 2, 1, 1, 1), "fsdp", batch)
    helpers.assert_close(jax.tree.leaves(found[0]), jax.tree.leaves(wanted[0]), 2e-5)
    helpers.assert_close(found[1], wanted[1])


def _of_each_row(config, batch):
    """Returns the gradient of each row's mean loss, flat, [B, parameters], one row a run."""
    mesh, rules = helpers.make_mesh()
    model = helpers.random_model(config.model, mesh, rules)
    with jax.set_mesh(mesh):

        def loss(model, row):
            sums = train_step.loss_sums(config, model, row)
            return sums.cross_entropy / sums.weight

        run = jax.jit(jax.grad(loss))
        rows = (jax.tree.map(operator.itemgetter(slice(i, i + 1)), batch) for i in range(8))
        return np.stack([_flat(run(model, helpers.place(row, mesh, rules))) for row in rows])


def _flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))])


def test_each_row_is_clipped_by_itself():
    config = _config()
    batch = helpers.random_batch(config)
    batch = batch._replace(
        segments=np.ones_like(batch.segments),
        positions=np.tile(np.arange(16, dtype=np.int32), (8, 1)),
    )
    batch.weights[0] = 0.0  # a row that teaches nothing
    batch.weights[1:, 0] = 1.0
    rows_BP = _of_each_row(
        config, batch._replace(weights=batch.weights + (np.arange(8) == 0)[:, None])
    )
    rows_BP[0] = 0.0
    norms_B = np.linalg.norm(rows_BP, axis=1)
    clip = float(np.median(norms_B))
    assert norms_B[1:].min() < clip < norms_B.max()
    found, _ = _gradients(
        _config(dp_clip_norm=clip, dp_noise_multiplier=0.0), (1, 4, 1, 1, 1), "fsdp", batch
    )
    wanted = rows_BP * np.minimum(1.0, clip / np.maximum(norms_B, 1e-9))[:, None]
    helpers.assert_close(_flat(found), wanted.mean(0), 2e-5)
    # Optax's, which takes the gradients of all rows at once.
    theirs = contrib.differentially_private_aggregate(clip, 0.0, seed=0)
    rows_BP = jnp.asarray(rows_BP)
    helpers.assert_close(
        _flat(found), np.asarray(theirs.update(rows_BP, theirs.init(rows_BP[0]))[0]), 2e-5
    )


@pytest.mark.long
def test_a_row_moves_the_sum_by_the_clipping_norm_at_most():
    config = _config(dp_clip_norm=0.05, dp_noise_multiplier=0.0)
    batch = helpers.random_batch(config, ragged=False)
    other = batch._replace(tokens=batch.tokens.copy(), targets=batch.targets.copy())
    other.tokens[2], other.targets[2] = 1, 7
    sums = [_flat(_gradients(config, batch=one)[0]) * 8 for one in (batch, other)]
    moved = np.linalg.norm(sums[0] - sums[1])
    assert 0.05 < moved <= 0.1 * (1 + 1e-5)  # one is taken out, another put in
    dull = batch._replace(weights=batch.weights.copy())
    dull.weights[2] = 0.0
    left_out = _flat(_gradients(config, batch=dull)[0]) * 8
    assert np.linalg.norm(sums[0] - left_out) == pytest.approx(0.05, rel=1e-4)


@pytest.mark.long
def test_noise_has_the_deviation_that_is_said_wherever_it_lies():
    # So much of it that the gradient, 8e-3 long at most, does not count.
    loud = _config(dp_clip_norm=1e-3, dp_noise_multiplier=1500.0)
    batch = helpers.random_batch(loud, ragged=False)
    found, _ = _gradients(loud, batch=batch)
    noise_P = 8 * _flat(found)
    # Its own deviation is 1 / sqrt(2 P) of it: 5 of these.
    assert len(noise_P) > 2000
    assert noise_P.std() == pytest.approx(1.5, rel=5 / np.sqrt(2 * len(noise_P)))
    assert abs(noise_P.mean()) < 5 * 1.5 / np.sqrt(len(noise_P))
    # Parameters of one shape have noise of their own, too.
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(found) if leaf.size > 100]
    alike = [(a, b) for a, b in itertools.combinations(leaves, 2) if a.size == b.size]
    assert len(alike) > 2
    for a, b in alike:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(a.size)
    cut, _ = _gradients(loud, (1, 4, 1, 1, 1), "fsdp", batch)
    helpers.assert_close(_flat(cut), _flat(found), 2e-5)


# Of dp-accounting 0.6.0: its RdpAccountant, PoissonSampledDpEvent of GaussianDpEvent, default orders.
EPSILONS = [
    (0.01, 1.0, 1000, 1e-5, 2.101366525420273),
    (0.001, 0.6, 10_000, 1e-6, 3.9991858528326922),
    (1.0, 4.0, 20, 1e-4, 4.762974993204782),
    (0.1, 2.0, 500, 1e-3, 4.510184667386474),
    (256 / 60_000, 1.1, 14_062, 1e-5, 2.5965558697943036),
]


@pytest.mark.parametrize("rate, noise, num_steps, delta, wanted", EPSILONS)
def test_epsilon_is_that_of_dp_accounting(rate, noise, num_steps, delta, wanted):
    found = private_gradients.epsilon(noise, rate, num_steps, delta)
    # Whole orders alone: never less, and little more (seen: 1.07 of it for the least noise, 1.01 for others).
    assert wanted * (1 - 1e-9) <= found <= wanted * 1.08
    assert private_gradients.epsilon(noise, rate, num_steps + 1, delta) > found
    assert private_gradients.epsilon(0.0, rate, num_steps, delta) == np.inf
    assert private_gradients.epsilon(noise, rate, 0, delta) == 0.0


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"data": {"packing": "packed"}}, "data.packing = 'packed'.*use 'concat'"),
        ({"model": helpers.EXPERTS}, "model.moe.num_experts = 4.*routers are balanced over rows"),
        ({"optim": {"accumulation_steps": 2}}, "optim.accumulation_steps = 2.*one by one"),
        ({"mesh": {"tensor": 2, "rules": "fsdp_tp"}}, "mesh.tensor = 2"),
        ({"model": {"attention": "pallas"}}, "model.attention = 'pallas'"),
        ({"objective": {"name": "contrastive"}, "model": {"head": "none"}}, "'contrastive'"),
        ({"optim": {"dp_clip_norm": 0.0}}, "dp_clip_norm = 0.0 will not do: above 0"),
        ({"optim": {"dp_delta": 1.0}}, r"dp_delta = 1.0 will not do: it must lie in \(0, 1\)"),
        ({"optim": {"dp_clip_norm": None, "dp_noise_multiplier": 2.0}}, "set optim.dp_clip_norm"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, part):
    sections = {
        "data": {"packing": "none" if "objective" in changes else "concat"},
        "optim": {"dp_clip_norm": 1.0},
    }
    for name, own in changes.items():
        sections[name] = sections.get(name, {}) | own
    with pytest.raises(errors.UserError, match=part):
        helpers.tiny_run_config(**sections)


@pytest.mark.long
def test_a_run_tells_its_epsilon(tmp_path, capfd):
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "some text " * 60}) + "\n")
    config = _config(dp_clip_norm=0.1, dp_noise_multiplier=2.0)
    data = dataclasses.replace(
        config.data,
        source=f"jsonl:{tmp_path}/data.jsonl:text",
        eval_source=f"jsonl:{tmp_path}/data.jsonl:text",
        cache_dir=str(tmp_path / "cache"),
    )
    model = dataclasses.replace(config.model, vocab_size=264)
    config = dataclasses.replace(
        config,
        model=model,
        data=data,
        train=config_lib.TrainConfig(num_steps=2, log_every=1, eval_every=0),
    )
    train.train(config, str(tmp_path / "run"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    # 600 characters, an end, and of these windows of 16: 38 rows, 8 of them in a step.
    for step, line in enumerate(lines, 1):
        row = json.loads(line)
        wanted = private_gradients.epsilon(2.0, 8 / 38, step, 1 / 38)
        assert row["privacy/epsilon"] == pytest.approx(wanted) and row["train/loss"] > 0
        assert row["privacy/delta"] == pytest.approx(1 / 38)
    assert f"epsilon {wanted:.4g} at delta 0.0263" in capfd.readouterr().err
    assert jnp.isfinite(row["train/grad_norm"])
