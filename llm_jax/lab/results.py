"""What is kept of runs: a line of JSON each in `experiments/NAME/results.jsonl`.

A line holds the run's settings as a hash, and the version of the code that made it: the files of `llm_jax`, and the
program of its training step. A result is of now if its settings are, and either the files are the same or the step
lowers to the same program: changes elsewhere do not make runs stale. Data and evaluation are not in the program.
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import subprocess
from typing import Any

import jax

import llm_jax
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import mesh as mesh_lib
from llm_jax import metrics as metrics_lib
from llm_jax import train_step
from llm_jax.aot import steps
from llm_jax.lab import sweep as sweep_lib

FILE = "results.jsonl"
DIVERGED = "train/diverged"  # of a row of metrics.jsonl, where a run ended by it

_MOST_POINTS = 40  # of a curve that is kept


@functools.cache
def code_hash() -> str:
    """Returns a hash of the files of the package."""
    folder = pathlib.Path(llm_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def program_hash(config: config_lib.RunConfig) -> str:
    """Returns a hash of the program of a run's step, as it lowers for one device of this process."""
    config = dataclasses.replace(config, mesh=config_lib.MeshConfig())
    mesh = mesh_lib.make(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = steps.placed(steps.abstract_state(config), mesh)
        batch = steps.abstract_batch(config, mesh)
        lowered = train_step.make_train_step(config).lower(state, batch)
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]


def commit() -> str:
    """Returns the commit of the code, and whether the package was changed since; "none" outside of a repository."""
    folder = pathlib.Path(llm_jax.__file__).parent
    git = ["git", "-C", str(folder)]
    done = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return "none"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], check=False)
    return done.stdout.strip() + "-dirty" * bool(changed.returncode)


class Results:
    """The results of a sweep, by the names of its runs.

    Args:
      folder: of the sweep.
      sweep: what they are of.

    Raises:
      errors.UserError: the file is damaged; says where.
    """

    def __init__(self, folder: pathlib.Path, sweep: sweep_lib.Sweep):
        self._path, self._sweep = folder / FILE, sweep
        self._rows: dict[str, dict[str, Any]] = {}
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                self._rows[row["run"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise errors.UserError(f"{self._path}:{number} is no result: {error}") from error

    def get(self, run: sweep_lib.Run) -> dict[str, Any] | None:
        """Returns the result of a run if it is of the settings of now, whatever the code that made it."""
        row = self._rows.get(run.name)
        is_own = row and row["settings"] == self._settings(run)
        return row if is_own else None

    def is_done(self, run: sweep_lib.Run) -> bool:
        """Returns whether a run has a result of the settings and of the code of now."""
        row = self.get(run)
        if row is None:
            return False
        return row["code"] == code_hash() or row["program"] == self._program(run)

    def add(self, run: sweep_lib.Run, found: Mapping[str, Any]) -> None:
        """Keeps the result of a run; the file is whole at any time."""
        self._rows[run.name] = {
            "run": run.name,
            "settings": self._settings(run),
            "code": code_hash(),
            "program": self._program(run),
            "commit": commit(),
        } | dict(found)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".tmp")
        partial.write_text("".join(json.dumps(row) + "\n" for _, row in sorted(self._rows.items())))
        os.replace(partial, self._path)

    def _settings(self, run: sweep_lib.Run) -> str:
        return " ".join(map(sweep_lib.settings_hash, self._sweep.configs(run)))

    def _program(self, run: sweep_lib.Run) -> str:
        return " ".join(map(program_hash, self._sweep.configs(run)))


def summary(
    sweep: sweep_lib.Sweep, workdir: str, evaluated: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    """Returns what is kept of a run's metrics.

    Raises:
      errors.UserError: the run ended without its metric, and did not diverge.
    """
    rows = metrics_lib.read(workdir)
    diverged = [row["step"] for row in rows if DIVERGED in row]
    kept = {
        name: thinned([[row["step"], row[name]] for row in rows if name in row])
        for name in dict.fromkeys((sweep.metric, "train/loss", *sweep.kept))
    }
    values = kept[sweep.metric]
    if not diverged:
        check_end(workdir)
    if not diverged and not values:
        raise errors.UserError(f"{workdir} has no {sweep.metric!r}: the sweep's runs must evaluate")
    return {
        "value": None if diverged else values[-1][1],
        "diverged_at": diverged[-1] if diverged else None,
        "curves": kept,
        "evaluations": dict(evaluated),
        "seconds": round(seconds, 1),
    }


def check_end(workdir: str) -> None:
    """Raises UserError where a run was stopped before its end."""
    left = metrics_lib.steps_left(workdir)
    if left:
        raise errors.UserError(f"{workdir} was stopped {left} steps before its end: run it again")


def thinned(points: list[Any], most: int = _MOST_POINTS) -> list[Any]:
    """Returns at most so many of the points of a curve, its last among them."""
    if len(points) <= most:
        return points
    picked = sorted({round(i * (len(points) - 1) / (most - 1)) for i in range(most)})
    return [points[i] for i in picked]
