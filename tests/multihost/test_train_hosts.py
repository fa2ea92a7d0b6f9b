"""Training by several processes over Gloo: the same run as one process's, and the same when cut."""

import dataclasses
import json
import signal
import time

import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax import evaluate
from llm_jax import peers
from llm_jax import train
from tests import helpers
from tests.multihost import runs

NUM_STEPS = 200
SQUARE = ("--config.mesh.data=2", "--config.mesh.tensor=2", "--config.mesh.rules=fsdp_tp")
# From the kill on: signs of life, the line on what is saved, and processes that compete for cores.
SECONDS_TO_END = runs.HEARTBEAT_TIMEOUT + 30


@pytest.mark.long
def test_hosts_of_which_one_is_told_to_end_leave_a_run_that_one_process_goes_on_with(
    tmp_path, capsys
):
    """Two processes of two devices, one of which gets SIGTERM; then one process of eight."""
    config_file = runs.write_config(tmp_path, 100_000)
    workdir = tmp_path / "run"
    run = runs.Run("llm_jax.train", workdir, f"--config={config_file}", hosts=2, devices=2)
    run.wait_for_steps_past(0)
    run.processes[1].send_signal(signal.SIGTERM)
    run.finish()
    last = runs.steps(workdir)[-1]
    assert run.err.getvalue().splitlines()[-1] == (
        f"[0] SIGTERM: saved step {last}; run the same command to go on"
    )

    # The first process alone writes: no line of the other, one file of each kind, no row twice.
    assert run.out.getvalue() == "" and "[1]" not in run.err.getvalue()
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert list(runs.rows(workdir, "train/loss")) == list(range(1, last + 1))
    assert {path.name for path in workdir.iterdir()} == {
        *("checkpoints", "config.json", "metrics.jsonl", "tensorboard")
    }

    saved = checkpoint.read_meta(checkpoint.directory(str(workdir)) / str(last)).config
    config = dataclasses.replace(saved, train=dataclasses.replace(saved.train, num_steps=last + 5))
    state = train.train(config, str(workdir))
    # Restored bit by bit: fingerprints that differ would have sent it to an older checkpoint.
    assert f"resumed from the checkpoint of step {last}" in capsys.readouterr().err
    expected = train.train(config, str(tmp_path / "whole"))
    helpers.assert_close(state.model, expected.model)
    for name in ("train/loss", "eval/validation/loss"):
        ours, wanted = runs.rows(workdir, name), runs.rows(tmp_path / "whole", name)
        if name.startswith("eval/"):
            wanted.pop(last, None)  # a run that is told to end saves, and leaves evaluation out
        assert list(ours) == list(wanted)
        np.testing.assert_allclose(list(ours.values()), list(wanted.values()), 1e-5)


# --- whole stories, in CI -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return runs.write_config(tmp_path_factory.mktemp("data"), NUM_STEPS)


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory):
    """The folder of an uninterrupted run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    _train(config_file, workdir, *SQUARE, hosts=1, devices=4).finish()
    assert runs.steps(workdir)[-1] == NUM_STEPS
    return workdir


def _train(config_file, workdir, *flags, hosts: int, devices: int) -> runs.Run:
    flags = (f"--config={config_file}", *flags)
    return runs.Run("llm_jax.train", workdir, *flags, hosts=hosts, devices=devices)


def _assert_whole(workdir, whole) -> None:
    """Checks that a run is the uninterrupted one, byte for byte.

    That holds where sums over an axis have two terms; see the tolerance of the first test.
    """
    runs.assert_same_bytes(runs.last_state(workdir), runs.last_state(whole))
    for name in ("train/loss", "train/grad_norm", "eval/validation/loss"):
        assert runs.rows(workdir, name) == runs.rows(whole, name)


def _unfinished(workdir) -> list[int]:
    """Returns the steps that are being saved."""
    names = [path.name for path in (workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")]
    return [int(name.partition(".")[0]) for name in names]


def _assert_told(run: runs.Run, lost: int, last: int) -> None:
    """Checks what the processes that were left said, each in one line."""
    lines = [line for line in run.err.getvalue().splitlines() if "error: " in line]
    left = [index for index in range(len(run.processes)) if index != lost]
    assert len(lines) == len(left), run.err.getvalue()
    for index, line in zip(left, sorted(lines)):
        who = f"process {index}: " if index else ""
        assert line.startswith(f"[{index}] {who}error: process {lost} was lost: ")
        assert (
            f"; step {last} in {run.workdir}/checkpoints is the last checkpoint: start all" in line
        )


@pytest.mark.long
def test_a_host_that_is_killed_ends_the_others_and_fewer_go_on(config_file, whole, tmp_path):
    """Four processes of one device, one killed while it saves; then two of two devices."""
    workdir = tmp_path / "run"
    run = _train(config_file, workdir, *SQUARE, hosts=4, devices=1)
    run.wait_for_steps_past(5)
    run.wait_until(lambda: _unfinished(workdir))
    run.processes[2].kill()
    started = time.monotonic()
    assert run.end() == [peers.LOST_PEER, peers.LOST_PEER, -signal.SIGKILL, peers.LOST_PEER]
    assert time.monotonic() - started < SECONDS_TO_END
    last, cut = runs.steps(workdir)[-1], _unfinished(workdir)
    assert 5 < last < NUM_STEPS and last not in cut
    _assert_told(run, 2, last)

    resumed = _train(config_file, workdir, *SQUARE, hosts=2, devices=2).finish()
    assert f"resumed from the checkpoint of step {last}" in resumed.err.getvalue()
    assert not _unfinished(workdir)
    _assert_whole(workdir, whole)
    _check_one_sided_damage(config_file, workdir, whole)
    _check_other_commands(workdir)


def _check_one_sided_damage(config_file, workdir, whole) -> None:
    """Damages what process 1 alone reads of the newest checkpoint: both take the one before."""
    newest, before = runs.steps(workdir)[-1], runs.steps(workdir)[-2]
    folder = workdir / "checkpoints" / str(newest)
    files = [path for path in folder.rglob("ocdbt.process_1/d/*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(b"")
    run = _train(config_file, workdir, *SQUARE, hosts=2, devices=2).finish()
    assert f"resumed from the checkpoint of step {before}" in run.err.getvalue()
    assert f"moved {folder}" in run.err.getvalue()
    _assert_whole(workdir, whole)


def _check_other_commands(workdir) -> None:
    """Evaluation and sampling by two processes say what one process says."""
    scores = checkpoint.read_latest(str(workdir), None, evaluate.score)
    run = runs.Run("llm_jax.evaluate", workdir, hosts=2, devices=2).finish()
    (line,) = run.out.getvalue().splitlines()
    assert json.loads(line.removeprefix("[0] ")) == pytest.approx(scores, rel=1e-5)
    flags = ("--prompt=the", "--max_tokens=8", "--num_samples=3")
    texts = [
        runs.Run("llm_jax.sampling", workdir, *flags, hosts=hosts, devices=4 // hosts).finish()
        for hosts in (1, 2)
    ]
    assert texts[0].out.getvalue() == texts[1].out.getvalue() != ""


@pytest.mark.long
def test_the_first_host_is_lost_as_clearly_as_any(config_file, tmp_path):
    """With process 0 goes JAX's coordination service, and JAX aborts the others from C++."""
    workdir = tmp_path / "run"
    run = _train(config_file, workdir, hosts=2, devices=1)
    run.wait_for_steps_past(0)
    run.processes[0].kill()
    started = time.monotonic()
    assert run.end() == [-signal.SIGKILL, peers.LOST_PEER]
    assert time.monotonic() - started < SECONDS_TO_END
    _assert_told(run, 0, runs.steps(workdir)[-1])


@pytest.mark.long
def test_a_loss_that_is_not_finite_ends_all(config_file, tmp_path):
    flags = ("--config.optim.learning_rate=1e30", "--config.optim.name=sgd")
    flags += ("--config.optim.warmup_steps=0", "--config.checkpoint.every=1")
    run = _train(config_file, tmp_path / "run", *flags, hosts=2, devices=1)
    assert run.end() == [peers.USAGE_ERROR] * 2
    lines = [line for line in run.err.getvalue().splitlines() if "error: " in line]
    assert len(lines) == 2
    for line in lines:
        assert "at step 2; step 1 is the last good" in line
    assert runs.steps(tmp_path / "run") == [1]
