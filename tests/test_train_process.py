"""Training as real processes that are killed: what is left is what an uninterrupted run leaves."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax import metrics
from tests.multihost import runs

ROOT = pathlib.Path(__file__).parents[1]
NUM_STEPS = 400
EVERY = 20  # steps between checkpoints
NUM_KILLS = 3
SEED = 20240607

CONFIG = """
from llm_jax import config

def get_config():
    c = config.new()
    c.model.update(num_layers=2, embed_dim=16, num_heads=2, vocab_size=256, max_length=16)
    c.data.update(source="text:{folder}/*.txt", cache_dir="{folder}/cache", eval_fraction=0.2)
    c.data.update(batch_size=8, sequence_length=16)
    c.optim.update(warmup_steps=10, learning_rate=0.01)
    c.train.update(num_steps={num_steps}, log_every=5, eval_every=100)
    c.checkpoint.update(every={every}, max_to_keep=2)
    c.compilation_cache = ""
    return c
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = "the model reads text and writes text as the data says".split()
    for index in range(12):
        (folder / f"{index:02}.txt").write_text(" ".join(rng.choices(words, k=200)))
    path = folder / "killed.py"
    path.write_text(CONFIG.format(folder=folder, num_steps=NUM_STEPS, every=EVERY))
    return path


def _start(config_file, workdir) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with (workdir.parent / f"{workdir.name}.log").open("a") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "llm_jax.train",
                f"--config={config_file}",
                f"--workdir={workdir}",
            ],
            env=environment,
            stdout=log,
            stderr=log,
        )


def _log(workdir) -> str:
    return (workdir.parent / f"{workdir.name}.log").read_text()


def _finish(config_file, workdir) -> None:
    assert _start(config_file, workdir).wait(timeout=180) == 0, _log(workdir)


def _wait_for_steps_past(workdir, step: int, process: subprocess.Popen) -> None:
    """Returns when a checkpoint past `step` is whole."""
    deadline = time.monotonic() + 120
    while (_steps(workdir) or [0])[-1] <= step:
        assert process.poll() is None, _log(workdir)
        assert time.monotonic() < deadline, _log(workdir)
        time.sleep(0.01)


def _steps(workdir) -> list[int]:
    return checkpoint.steps(checkpoint.directory(str(workdir)))


def _rows(workdir, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in metrics.read(workdir) if name in row]


def _assert_same(workdir, expected_dir) -> None:
    state, expected = runs.last_state(workdir), runs.last_state(expected_dir)
    assert int(expected.step) == NUM_STEPS
    leaves, wanted = jax.tree.leaves(state), jax.tree.leaves(expected)
    assert len(leaves) == len(wanted) > 10
    for leaf, other in zip(leaves, wanted):
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


@pytest.fixture(scope="module")
def uninterrupted(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    _finish(config_file, workdir)
    assert _steps(workdir)[-1] == NUM_STEPS
    return workdir


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_ends_as_the_uninterrupted_one(
    config_file, uninterrupted, tmp_path
):
    print(f"seed {SEED}")  # of the moments of the kills; shown when the test fails
    rng = random.Random(SEED)
    workdir = tmp_path / "run"
    for _ in range(NUM_KILLS):
        before = (_steps(workdir) or [0])[-1]
        process = _start(config_file, workdir)
        _wait_for_steps_past(workdir, before, process)
        delay = rng.uniform(0.0, 0.2)  # some saves long: also into the middle of one
        time.sleep(delay)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was over before the kill: raise NUM_STEPS"
        print(f"killed {delay:.3f} s after a checkpoint; there are {_steps(workdir)}")
        assert before < _steps(workdir)[-1] < NUM_STEPS
    _finish(config_file, workdir)
    assert _log(workdir).count("resumed from the checkpoint") == NUM_KILLS
    _assert_same(workdir, uninterrupted)
    for name in ("train/loss", "train/grad_norm", "eval/validation/loss"):
        rows = _rows(workdir, name)
        assert rows == _rows(uninterrupted, name)
        assert len(rows) == len(dict(rows)) >= NUM_STEPS // 100


def test_a_run_that_is_told_to_end_saves_and_goes_on_by_itself(
    config_file, uninterrupted, tmp_path
):
    workdir = tmp_path / "run"
    process = _start(config_file, workdir)
    _wait_for_steps_past(workdir, 0, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0, _log(workdir)
    (line,) = [line for line in _log(workdir).splitlines() if "SIGTERM" in line]
    last = _steps(workdir)[-1]
    assert last < NUM_STEPS
    assert f"saved step {last}; run the same command to go on" in line
    _finish(config_file, workdir)
    assert f"resumed from the checkpoint of step {last}" in _log(workdir)
    _assert_same(workdir, uninterrupted)
    assert _rows(workdir, "train/loss") == _rows(uninterrupted, "train/loss")
