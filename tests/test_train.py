"""The training loop on a tiny byte model: resumed equals uninterrupted, and what it leaves behind."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import evaluate
from llm_jax import mesh as mesh_lib
from llm_jax import metrics
from llm_jax import sharding
from llm_jax import train
from llm_jax import train_step
from llm_jax.data import prepare
from tests import helpers

NUM_STEPS = 20
EVERY = 5  # steps between checkpoints, and between evaluations


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with some documents and the token cache that is made of them."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = "the model reads text and writes text as the data says é".split()
    for index in range(12):
        (folder / f"{index:02}.txt").write_text(" ".join(rng.choice(words, 60)), encoding="utf-8")
    return folder


def _config(data_dir, **sections) -> config_lib.RunConfig:
    data = {
        "source": f"text:{data_dir}/*.txt",
        "cache_dir": str(data_dir / "cache"),
        "eval_fraction": 0.2,
    }
    base = {
        "data": data,
        "optim": {"warmup_steps": 2, "learning_rate": 0.01},
        "train": {"num_steps": NUM_STEPS, "log_every": 1, "eval_every": EVERY},
        "checkpoint": {"every": EVERY, "max_to_keep": 2},
    }
    for name, changes in sections.items():
        base[name] = base.get(name, {}) | changes
    model = {"vocab_size": 256, "init_stddev": 0.05} | base.pop("model", {})
    return helpers.tiny_run_config(model, **base)


def _rows(workdir, name="train/loss") -> dict[int, float]:
    """Returns one metric by step; a step that comes twice fails."""
    rows = [(row["step"], row[name]) for row in metrics.read(workdir) if name in row]
    assert len(rows) == len(dict(rows)), "a step was written twice"
    assert sorted(rows) == rows
    return dict(rows)


def _restored(workdir, config) -> train_step.TrainState:
    """Returns the state of the newest checkpoint, read from disk onto one device."""
    mesh, rules = helpers.make_mesh()
    tokenizer = prepare.make_tokenizer(config.data).to_dict()
    manager = checkpoint.Checkpoints(str(workdir), config, tokenizer)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: train_step.init_state(config, rules))
        state = manager.restore_latest(abstract, mesh)
    manager.close()
    return jax.device_get(state)


class _Cut(Exception):
    """Stands for a process that dies."""


def _die_at(monkeypatch, step: int) -> None:
    write = metrics.Writer.write

    def dying(self, at, scalars):
        write(self, at, scalars)
        if at == step:
            raise _Cut

    monkeypatch.setattr(metrics.Writer, "write", dying)
    save = checkpoint.Checkpoints.save

    def saving(self, *args):
        save(self, *args)
        self.wait()  # steps take a millisecond here: it would die before the save is done

    monkeypatch.setattr(checkpoint.Checkpoints, "save", saving)


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """An uninterrupted run: its config, its folder and its last state."""
    workdir = tmp_path_factory.mktemp("whole")
    config = _config(data_dir)
    return config, workdir, jax.device_get(train.train(config, str(workdir)))


# --- resuming -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_stopped_and_cut_off_ends_as_the_uninterrupted_one(
    whole, tmp_path, monkeypatch, capsys
):
    config, whole_dir, expected = whole
    workdir = str(tmp_path)
    with monkeypatch.context() as patch:  # asked to stop at its seventh step, it saves
        asked = iter([False] * 6 + [True])
        patch.setattr(train.Preemption, "is_requested", lambda self: next(asked))
        assert int(train.train(config, workdir).step) == 7
    assert checkpoint.steps(checkpoint.directory(workdir))[-1] == 7
    assert "saved step 7" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # dies at step 13, past the checkpoint of step 10
        _die_at(patch, 13)
        with pytest.raises(_Cut):
            train.train(config, workdir)
    assert max(_rows(workdir)) == 13
    capsys.readouterr()
    final = train.train(config, workdir)
    assert "resumed from the checkpoint of step 10" in capsys.readouterr().err

    helpers.assert_equal(final, expected)
    helpers.assert_equal(_restored(workdir, config), _restored(whole_dir, config))
    assert int(final.step) == NUM_STEPS
    assert _rows(workdir) == _rows(whole_dir)
    assert list(_rows(workdir)) == list(range(1, NUM_STEPS + 1))
    assert _rows(workdir, "eval/validation/loss") == _rows(whole_dir, "eval/validation/loss")


def test_the_checkpoint_holds_the_last_state(whole):
    config, workdir, state = whole
    helpers.assert_equal(_restored(workdir, config), state)


def test_a_finished_run_is_left_as_it_is(whole, capsys):
    config, workdir, state = whole
    before = (workdir / metrics.FILE_NAME).read_text()
    helpers.assert_equal(train.train(config, str(workdir)), state)
    assert (workdir / metrics.FILE_NAME).read_text() == before
    assert f"step {NUM_STEPS}" in capsys.readouterr().err


def test_a_refused_config_changes_nothing(whole):
    config, workdir, _ = whole
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=3))
    before = (workdir / "config.json").read_text()
    with pytest.raises(errors.UserError, match="num_layers: 2 in the checkpoint, 3 now"):
        train.train(other, str(workdir))
    assert (workdir / "config.json").read_text() == before
    assert config_lib.from_dict(json.loads(before)) == config


# --- what a run leaves behind -------------------------------------------------------------------


def test_loss_goes_down(whole):
    losses = list(_rows(whole[1]).values())
    assert losses[0] == pytest.approx(math.log(256), rel=0.05)  # nothing is known yet
    assert np.mean(losses[-5:]) < losses[0] - 1.0


def test_rows_say_what_was_done(whole):
    config, workdir, _ = whole
    rows = [row for row in metrics.read(workdir) if "train/loss" in row]
    assert rows[0]["step"] == 1
    for row in rows:
        assert {"train/grad_norm", "train/learning_rate", "perf/tokens_per_second"} <= set(row)
        assert 0 < row["train/tokens"] <= config.data.batch_size * config.data.sequence_length
    assert rows[0]["train/learning_rate"] == pytest.approx(0.01 / 3)
    assert rows[-1]["train/learning_rate"] == pytest.approx(0.01 * 0.1)
    assert list((workdir / "tensorboard").glob("*tfevents*"))


def test_evaluation_and_checkpoints_come_when_they_are_due(whole):
    _, workdir, _ = whole
    due = list(range(EVERY, NUM_STEPS + 1, EVERY))
    scores = _rows(workdir, "eval/validation/loss")
    assert list(scores) == due
    best = min(scores, key=scores.get)
    kept = checkpoint.steps(checkpoint.directory(str(workdir)))
    assert set(kept) == {*due[-2:], best}


def test_the_last_step_is_logged_evaluated_and_saved_off_cadence(data_dir, tmp_path):
    config = _config(
        data_dir,
        train={"num_steps": 5, "log_every": 3, "eval_every": 4},
        checkpoint={"every": 0},
    )
    train.train(config, str(tmp_path))
    assert list(_rows(tmp_path)) == [3, 5]
    assert list(_rows(tmp_path, "eval/validation/loss")) == [4, 5]
    assert checkpoint.steps(checkpoint.directory(str(tmp_path))) == [5]


def _independent_scores(model, config) -> tuple[float, float]:
    """Returns loss and bits per byte by a walk over the tokens, one window after the other."""
    cache = prepare.prepare(config).eval
    stream, length = np.asarray(cache.tokens[:], np.int32), config.data.sequence_length
    total, count = 0.0, 0
    forward = jax.jit(lambda m, t, p, s: m(t, p, s))
    for start in range(0, len(stream) - 1, length):
        tokens = stream[start : start + length + 1]
        segments, positions, segment, position = [], [], 1, 0
        for token in tokens[:-1]:
            segments.append(segment)
            positions.append(position)
            position += 1
            if token == cache.eos_id:
                segment, position = segment + 1, 0
        logits = np.asarray(
            forward(
                model,
                tokens[None, :-1],
                np.asarray([positions], np.int32),
                np.asarray([segments], np.int32),
            ),
            np.float64,
        )[0]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place, token in enumerate(tokens[:-1]):
            if token != cache.eos_id:  # what follows an end belongs to another document
                total -= log_probs[place, tokens[place + 1]]
                count += 1
    loss = total / count
    return loss, loss / math.log(2) * len(stream) / cache.num_bytes


def test_evaluation_equals_an_independent_computation(whole):
    config, workdir, _ = whole
    mesh, _ = helpers.make_mesh()
    with jax.set_mesh(mesh):
        loss, bits = _independent_scores(_restored(workdir, config).model, config)
    last = metrics.read(workdir)[-1]
    assert last["step"] == NUM_STEPS
    assert last["eval/validation/loss"] == pytest.approx(loss, rel=1e-5)
    assert last["eval/validation/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert last["eval/validation/bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_the_evaluate_command_scores_a_checkpoint_as_the_run_did(whole):
    _, workdir, _ = whole
    last = metrics.read(workdir)[-1]
    scores = checkpoint.read_latest(str(workdir), None, evaluate.score)
    assert scores["step"] == NUM_STEPS
    for name in ("loss", "perplexity", "bits_per_byte"):
        key = f"eval/validation/{name}"
        assert scores[key] == pytest.approx(last[key], rel=1e-5)


def test_eval_steps_bounds_an_evaluation(whole, data_dir):
    config, workdir, _ = whole
    few = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_steps=1))
    mesh = mesh_lib.make(config.mesh)
    rules = sharding.axis_rules(config.mesh)
    batch_sharding = jax.sharding.NamedSharding(mesh, rules.act("BT"))
    sums = []

    def eval_step(model, batch):
        del model
        sums.append(float(np.sum(np.asarray(batch.weights))))
        return train_step.losses.LossSums(sums[-1] * 2.0, 0.0, sums[-1])

    prepared = prepare.prepare(config)
    scores = evaluate.Evaluator(prepared, few, batch_sharding, eval_step)(None)
    assert len(sums) == 1 and scores["eval/validation/loss"] == pytest.approx(2.0)
    evaluate.Evaluator(prepared, config, batch_sharding, eval_step)(None)
    windows = -(-(prepared.eval.num_tokens - 1) // config.data.sequence_length)
    assert len(sums) - 1 == -(-windows // config.data.batch_size) > 1


# --- what goes wrong ----------------------------------------------------------------------------


def test_training_that_diverges_stops_and_keeps_the_last_good_checkpoint(data_dir, tmp_path):
    # The first update is finite and enormous; the second step's loss is not finite.
    config = _config(
        data_dir,
        optim={"learning_rate": 1e30, "warmup_steps": 0, "schedule": "constant", "name": "sgd"},
        train={"eval_every": 0},
        checkpoint={"every": 1},
    )
    with pytest.raises(train.NonFiniteError) as caught:
        train.train(config, str(tmp_path))
    message = str(caught.value)
    assert re.search(r"train/(loss|grad_norm) = (nan|inf) at step 2; step 1 is the last", message)
    assert checkpoint.steps(checkpoint.directory(str(tmp_path))) == [1]
    for advice in ("config.optim.learning_rate", "on_nonfinite=skip", str(tmp_path)):
        assert advice in message
    state = _restored(tmp_path, config)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.model))


def test_an_update_that_overflows_is_not_saved(data_dir, tmp_path):
    # Loss and gradient of step 4 are finite, what it leaves behind is not.
    config = _config(
        data_dir,
        train={"eval_every": 0, "num_steps": 6},
        checkpoint={"every": 1},
    )
    step = train_step.make_train_step(config)

    def overflowing(state, batch):
        state, scalars = step(state, batch)
        overflow = np.float32(3e38) * (1 + 9 * (state.step == 4))  # infinite at the fourth
        model = jax.tree.map(lambda leaf: jnp.where(overflow > 3.3e38, overflow, leaf), state.model)
        return dataclasses.replace(state, model=model), scalars

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "make_train_step", lambda _: jax.jit(overflowing))
        with pytest.raises(train.NonFiniteError, match="at step 4; step 3 is the last good"):
            train.train(config, str(tmp_path))
    assert checkpoint.steps(checkpoint.directory(str(tmp_path)))[-1] == 3


def test_skipped_updates_are_counted_and_leave_no_trace(data_dir, tmp_path, capsys):
    config = _config(
        data_dir,
        train={"num_steps": 6, "on_nonfinite": "skip", "z_loss": 3e38, "eval_every": 0},
        optim={"clip_norm": None},
    )
    state = train.train(config, str(tmp_path))
    assert int(state.num_skipped) == 6 and int(state.step) == 6
    assert list(_rows(tmp_path, "train/num_skipped").values()) == [1, 2, 3, 4, 5, 6]
    assert all(isinstance(v, str) for v in _rows(tmp_path, "train/grad_norm").values())  # no NaN
    assert "6 updates skipped" in capsys.readouterr().err
    mesh = mesh_lib.make(config.mesh)
    with jax.set_mesh(mesh):
        rules = sharding.axis_rules(config.mesh)
        first = jax.jit(lambda: train_step.init_state(config, rules))()
    helpers.assert_equal(state.model, first.model)


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [3, 12], ids=["short", "long"])
def test_a_profile_is_written(data_dir, tmp_path, num_steps):
    config = _config(data_dir, train={"num_steps": num_steps, "eval_every": 0})
    config = dataclasses.replace(config, profile=True)
    train.train(config, str(tmp_path))
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
