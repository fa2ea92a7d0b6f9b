"""Training runs as several real processes, for tests."""

import io
import os
import pathlib
import random
import signal
import sys
import threading
import time

import jax
import numpy as np

from launch import local
from llm_jax import checkpoint
from llm_jax import metrics
from llm_jax import train_step
from tests import helpers

ROOT = pathlib.Path(__file__).parents[2]
HEARTBEAT_TIMEOUT = 20  # seconds
END_SECONDS = 240  # after which a command hangs, for all that tests know

CONFIG = """
from llm_jax import config

def get_config():
    c = config.new()
    c.model.update(num_layers=2, embed_dim=16, num_heads=2, vocab_size=256, max_length=16)
    c.model.dtype = "float32"
    c.data.update(source="text:{folder}/*.txt", cache_dir="{folder}/cache", eval_fraction=0.2)
    c.data.update(batch_size=8, sequence_length=16)
    c.optim.update(warmup_steps=10, learning_rate=0.003, schedule="constant")
    c.train.update(num_steps={num_steps}, log_every=1, eval_every=10, eval_steps=2)
    c.checkpoint.update(every=5, max_to_keep=2)
    c.compilation_cache = ""
    return c
"""


def write_config(folder: pathlib.Path, num_steps: int) -> pathlib.Path:
    """Writes some documents and the config of a run on them; returns the config's path."""
    rng = random.Random(0)
    words = "the model reads text and writes text as the data says".split()
    for index in range(12):
        (folder / f"{index:02}.txt").write_text(" ".join(rng.choices(words, k=200)))
    path = folder / "hosts.py"
    path.write_text(CONFIG.format(folder=folder, num_steps=num_steps))
    return path


class Run:
    """A command of a run as several processes, and what they print, a line each, `[i]` in front."""

    def __init__(self, module: str, workdir: pathlib.Path, *flags: str, hosts: int, devices: int):
        kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        self.out, self.err = io.StringIO(), io.StringIO()
        self.workdir = workdir
        self._group = local.start(
            [sys.executable, "-m", module, f"--workdir={workdir}", *flags]
            + [f"--heartbeat_timeout={HEARTBEAT_TIMEOUT}"],
            num_processes=hosts,
            devices_per_process=devices,
            environment=kept
            | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"},
            stdout=self.out,
            stderr=self.err,
        )
        self.processes = self._group.processes

    def wait_for_steps_past(self, step: int) -> None:
        """Returns when a checkpoint past `step` is whole."""
        self.wait_until(lambda: (steps(self.workdir) or [0])[-1] > step)

    def wait_until(self, happens) -> None:
        """Returns when `happens()` is true; fails if a process ends before."""
        deadline = time.monotonic() + 180
        while not happens():
            codes = [process.poll() for process in self.processes]
            is_late = time.monotonic() > deadline
            if is_late or codes != [None] * len(codes):
                self.end()
                raise AssertionError(f"{codes}\n{self.err.getvalue()}")
            time.sleep(0.005)

    def end(self) -> list[int]:
        """Waits for all, and kills those that hang; returns the exit codes."""
        timer = threading.Timer(END_SECONDS, self._group.send, [signal.SIGKILL])
        timer.start()
        self._group.wait(grace=END_SECONDS)
        timer.cancel()
        return [process.returncode for process in self.processes]

    def finish(self) -> "Run":
        """Waits for the end and checks that it is a good one."""
        codes = self.end()
        assert codes == [0] * len(codes), self.err.getvalue()
        return self


def steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps that were saved whole."""
    return checkpoint.steps(checkpoint.directory(str(workdir)))


def last_state(workdir: pathlib.Path) -> train_step.TrainState:
    """Returns the state of the newest checkpoint, onto one device of this process."""
    mesh, rules = helpers.make_mesh()
    step_dir = checkpoint.directory(str(workdir)) / str(steps(workdir)[-1])
    meta = checkpoint.read_meta(step_dir)
    manager = checkpoint.Checkpoints(str(workdir), meta.config, meta.tokenizer)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: train_step.init_state(meta.config, rules))
        state = manager.restore_latest(abstract, mesh)
    manager.close()
    assert int(state.step) == meta.step
    return jax.device_get(state)


def rows(workdir: pathlib.Path, name: str) -> dict[int, float]:
    """Returns one metric by step; a step that comes twice fails."""
    found = [(row["step"], row[name]) for row in metrics.read(workdir) if name in row]
    assert len(found) == len(dict(found)), "a step was written twice"
    return dict(found)


def assert_same_bytes(state, expected) -> None:
    """Compares two states byte for byte."""
    leaves, wanted = jax.tree.leaves(state), jax.tree.leaves(expected)
    assert len(leaves) == len(wanted) > 10
    for leaf, other in zip(leaves, wanted):
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()
