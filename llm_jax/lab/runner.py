"""Makes the runs that a sweep lacks: in processes of this machine, or on slices.

Each run is `python -m llm_jax.train` with a workdir of its own, so that one that was interrupted goes on. One that
fails is told, and the others go on; one whose loss is no longer finite is a result.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from typing import Any

from llm_jax import errors
from llm_jax import metrics as metrics_lib
from llm_jax.data import sources
from llm_jax.lab import results as results_lib
from llm_jax.lab import sweep as sweep_lib

# `python -m`, on some cores: a child sets them itself, as a process with threads must not fork to do it.
_PINNED = """
import os, runpy, sys
os.sched_setaffinity(0, set(map(int, sys.argv[1].split(","))))
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
_LAST_LINES = 4  # of what a failed run said


@dataclasses.dataclass(frozen=True)
class Failure:
    """A run that ended without a result, and what it said last."""

    run: str
    said: str


@dataclasses.dataclass(frozen=True)
class Local:
    """Runs processes on this machine, each on cores of its own where the system can say so.

    Attributes:
      root: of the repository, where configs are found.
      config: path of the sweep's file.
      workdirs: folder of workdirs.
      is_kept: whether a workdir stays when its result is kept.
    """

    root: pathlib.Path
    config: str
    workdirs: pathlib.Path
    is_kept: bool = False

    def workdir(self, run: sweep_lib.Run) -> str:
        """Returns the workdir of a run."""
        return str(self.workdirs / _folder_name(run))

    def train(
        self, run: sweep_lib.Run, cores: Sequence[int], is_probe: bool = False
    ) -> subprocess.CompletedProcess:
        """Trains a run to its end, or what follows it to its own."""
        return self._command(["llm_jax.train", *self._what(run, is_probe)], cores)

    def probe_workdir(self, run: sweep_lib.Run) -> str:
        """Returns the workdir of what follows a run."""
        return f"{self.workdir(run)}/probe"

    def _what(self, run: sweep_lib.Run, is_probe: bool) -> list[str]:
        workdir = self.workdir(run)
        if not is_probe:
            return [f"--config={self.config}:{run.name}", f"--workdir={workdir}"]
        return [
            f"--config={self.config}:{run.name};probe",
            f"--workdir={self.probe_workdir(run)}",
            f"--config.tune.start={workdir}",
            f"--config.data.tokenizer=workdir:{workdir}",
        ]

    def evaluate(
        self, run: sweep_lib.Run, name: str, cores: Sequence[int]
    ) -> subprocess.CompletedProcess:
        """Scores the last checkpoint of a run by one of the sweep's evaluations."""
        like = f"--config={self.config}:{run.name};evaluation={name}"
        return self._command(["llm_jax.evaluate", like, f"--workdir={self.workdir(run)}"], cores)

    def clean(self, run: sweep_lib.Run) -> None:
        """Removes what a run left, whose result is kept."""
        if not self.is_kept:
            shutil.rmtree(self.workdir(run), ignore_errors=True)

    def _command(self, argv: list[str], cores: Sequence[int]) -> subprocess.CompletedProcess:
        how = ["-c", _PINNED, ",".join(map(str, cores))] if cores else ["-m"]
        return subprocess.run(
            [sys.executable, *how, *argv],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.root,
        )


@dataclasses.dataclass(frozen=True)
class Slices(Local):
    """Runs each on a slice of its own, by `launch.tpu watch`; workdirs are in a bucket.

    Attributes:
      arguments: of `launch.tpu watch`: project, zone and so on.
      bucket: `gs://BUCKET/FOLDER`.
    """

    arguments: str = ""
    bucket: str = ""

    def workdir(self, run: sweep_lib.Run) -> str:
        return f"{self.bucket}/{_folder_name(run)}"

    def train(
        self, run: sweep_lib.Run, cores: Sequence[int], is_probe: bool = False
    ) -> subprocess.CompletedProcess:
        del cores
        # Names of slices take letters, digits and hyphens.
        name = re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")[:60]
        argv = ["launch.tpu", "watch", name, *self._what(run, is_probe)]
        return self._command([*argv, *shlex.split(self.arguments)], ())

    def clean(self, run: sweep_lib.Run) -> None:
        del run  # what is in a bucket stays


def _folder_name(run: sweep_lib.Run) -> str:
    return re.sub(r"[^\w.=-]+", "_", run.name)


def cores_of(num_workers: int) -> list[tuple[int, ...]]:
    """Returns the cores of each worker; none where the system pins nothing, or has fewer than workers."""
    if not hasattr(os, "sched_getaffinity"):
        return [()] * num_workers
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // num_workers
    if not share:
        return [()] * num_workers
    return [tuple(cores[i * share : (i + 1) * share]) for i in range(num_workers)]


def run_missing(
    sweep: sweep_lib.Sweep,
    results: results_lib.Results,
    runs: Sequence[sweep_lib.Run],
    executor: Local,
    num_workers: int = 1,
    say: Callable[[str], None] = print,
) -> list[Failure]:
    """Makes the runs that have no result of now; returns those that failed.

    Args:
      sweep: whose budgets are checked before anything runs.
      results: to which each is added as it ends.
      runs: of the sweep.
      executor: where they run.
      num_workers: runs side by side.
      say: takes a line of progress after each run.
    """
    sweep.check_budgets()
    _check_files(sweep)
    missing = [run for run in runs if not results.is_done(run)]
    say(f"{sweep.name}: {len(runs)} runs, {len(runs) - len(missing)} done")
    free, lock, started = cores_of(num_workers), threading.Lock(), time.monotonic()
    failures: list[Failure] = []
    finished = 0

    def one(run: sweep_lib.Run) -> None:
        nonlocal finished
        with lock:
            cores = free.pop()
        began = time.monotonic()
        try:
            found = _made(sweep, run, executor, cores, began)
        except (
            errors.UserError
        ) as error:  # of this run: the others go on, and the end says which failed
            found = Failure(run.name, str(error))
        with lock:
            free.append(cores)
            finished += 1
            if isinstance(found, Failure):
                failures.append(found)
                state = f"failed: {found.said}"
            else:
                results.add(run, found)
                executor.clean(run)
                at = found["diverged_at"]
                state = f"{found['value']:.4f}" if at is None else f"diverged at step {at}"
            left = (time.monotonic() - started) / finished * (len(missing) - finished)
            say(f"{finished}/{len(missing)} {run.name}: {state}; {left / 60:.0f} minutes left")

    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        list(pool.map(one, missing))
    return failures


def _check_files(sweep: sweep_lib.Sweep) -> None:
    """Raises UserError for files of a probe that there are not, which runs would come to at their end."""
    if sweep.probe is None:
        return
    data = sweep.config(sweep.runs()[0], is_probe=True).data
    for split in (data.train_split, data.eval_split):
        try:
            sources.identity(data, split)
        except errors.UserError as error:
            message = f"{sweep.name} ends with a probe: {error}; its README says what makes them"
            raise errors.UserError(message) from error


def _made(
    sweep: sweep_lib.Sweep,
    run: sweep_lib.Run,
    executor: Local,
    cores: Sequence[int],
    began: float,
) -> dict[str, Any] | Failure:
    """Returns what is kept of a run that is made now, or that it failed."""
    done = executor.train(run, cores)
    workdir = executor.workdir(run)
    if done.returncode and not _has_diverged(workdir):
        return Failure(run.name, _last_lines(done))
    if sweep.probe is not None and not done.returncode:
        results_lib.check_end(workdir)
        done, workdir = executor.train(run, cores, is_probe=True), executor.probe_workdir(run)
        if done.returncode and not _has_diverged(workdir):
            return Failure(run.name, f"probe: {_last_lines(done)}")
    evaluated = {}
    for name in sweep.evaluations if not done.returncode else ():
        scored = executor.evaluate(run, name, cores)
        if scored.returncode:
            return Failure(run.name, f"evaluation {name}: {_last_lines(scored)}")
        found = json.loads(scored.stdout.strip().splitlines()[-1])
        evaluated[name] = next(value for key, value in found.items() if key.endswith("/loss"))
    return results_lib.summary(sweep, workdir, evaluated, time.monotonic() - began)


def _has_diverged(workdir: str) -> bool:
    return any(results_lib.DIVERGED in row for row in _rows(workdir))


def _rows(workdir: str) -> Iterator[dict[str, Any]]:
    try:
        yield from metrics_lib.read(workdir)
    except FileNotFoundError:
        return


def _last_lines(done: subprocess.CompletedProcess) -> str:
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return " / ".join(lines[-_LAST_LINES:]) or f"exit code {done.returncode}"
