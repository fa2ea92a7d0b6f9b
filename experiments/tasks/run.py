"""Trains and scores tasks, one command after the other: `python -m experiments.tasks.run --tasks=NAME,...|all`.

    --runs=runs        folder of workdirs
    --again            runs commands of it that were done before, too

Each stage is a process of its own, whose seconds are added up over interruptions in WORKDIR/stages.json: what was
done is not done again, what was interrupted goes on. The row that comes of it, with scores, seconds and three
outputs, is kept in `experiments/tasks/results/NAME.json`; `python -m experiments.tasks.report` writes the README's
table of all rows.
"""

import collections
from collections.abc import Sequence
import datetime
import json
import os
import pathlib
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from typing import Any

from absl import flags
import jax

from experiments.tasks import suite
from experiments.tasks.data import __main__ as data_command
from llm_jax import command
from llm_jax import errors
from llm_jax import metrics

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = pathlib.Path(__file__).parent / "results"
_RUNS = re.compile(r"(^|[=:,])runs/")
_LONGEST = 240  # characters of a text that is shown


def stages_of(task: suite.Task) -> dict[str, str]:
    """Returns all commands of a task by their stage: data, models, then its own."""
    found = {f"data {data}": f"experiments.tasks.data {data}" for data in task.data}
    for model in task.models:
        found[f"model {model}"] = f"experiments.tasks.models {model} runs/{model}"
    return found | dict(task.commands)


class Runner:
    """Runs the stages of a task; keeps what was done and how long it took in its workdir.

    Args:
      name, task: of `suite.TASKS`.
      runs: folder that commands call `runs/`.
      is_again: whether its own commands run though they were done.
    """

    def __init__(self, name: str, task: suite.Task, runs: pathlib.Path, is_again: bool = False):
        self._name, self._task, self._runs = name, task, runs
        self._file = runs / name / "stages.json"
        self._is_again = is_again

    def run(self) -> dict[str, Any]:
        """Runs what is missing; returns the row.

        Raises:
          errors.UserError: a stage failed; what it said stands above.
        """
        said = ""
        for stage, line in stages_of(self._task).items():
            said = self._stage(stage, line)
        return self._row(said)

    def _stage(self, stage: str, line: str) -> str:
        """Runs a command if need be; returns the last line that it printed."""
        done = self._stages()
        if self._is_done(stage, line, done):
            return done[stage]["said"] if stage in done else ""
        print(f"{self._name}: {stage}: python -m {line}", flush=True)
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", *self._argv(line)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        last = collections.deque(maxlen=1)
        for out in process.stdout:
            print(out, end="", flush=True)
            last.append(out.strip())
        code = process.wait()
        own = done.setdefault(stage, {"seconds": 0.0})
        own["seconds"] = round(own["seconds"] + time.monotonic() - started, 1)
        own |= {"command": line, "is_done": code == 0, "said": last[0] if last else ""}
        if code == 0 and line.startswith("llm_jax.train ") and self._steps_left(line):
            own["is_done"], code = False, signal.SIGTERM
        self._keep(done)
        if code:
            raise errors.UserError(f"{self._name}: {stage} ended with code {code}: {line}")
        return own["said"]

    def _steps_left(self, line: str) -> int:
        """Returns how many steps a run that has ended well has left: it was told to stop."""
        (workdir,) = (part for part in self._argv(line) if part.startswith("--workdir="))
        return metrics.steps_left(workdir.partition("=")[2])

    def _keep(self, done: dict[str, Any]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".tmp")
        partial.write_text(json.dumps(done, indent=1) + "\n")
        partial.replace(self._file)

    def _stages(self) -> dict[str, Any]:
        return json.loads(self._file.read_text()) if self._file.exists() else {}

    def _is_done(self, stage: str, line: str, done: dict[str, Any]) -> bool:
        kind, _, which = stage.partition(" ")
        if kind == "data":
            return (data_command.FOLDER / which.replace(":", "_") / "about.json").exists()
        if kind == "model":
            return (self._runs / which).exists()
        if self._is_again or stage not in done:
            return False
        return done[stage]["is_done"] and done[stage]["command"] == line

    def _argv(self, line: str) -> list[str]:
        """Returns a command with `runs/` as the folder of this machine."""
        return [_RUNS.sub(rf"\g<1>{self._runs}/", part) for part in shlex.split(line)]

    def _row(self, said: str) -> dict[str, Any]:
        found = json.loads(said.replace(f"{self._runs}/", "runs/"))
        done = self._stages()
        return {
            "title": self._task.title,
            "commands": list(stages_of(self._task).values()),
            "seconds": {stage: done[stage]["seconds"] for stage in self._task.commands},
            "examples": next((found[key] for key in ("examples", "queries") if key in found), None),
            "scores": found["scores"] if "scores" in found else {},
            "found": {key: value for key, value in found.items() if key in ("runs", "score")},
            "baselines": [self._baseline(*one) for one in self._task.baselines],
            "outputs": self._outputs() if self._task.outputs else [],
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}",
            "date": datetime.date.today().isoformat(),
        }

    def _baseline(self, label: str, place: str, key: str) -> dict[str, Any]:
        """Returns what scores stand beside: of a file of results, or of a stage that ran before."""
        kind, _, stage = place.partition(" ")
        if kind == "stage":
            scores = json.loads(self._stages()[stage]["said"])["scores"]
        else:
            scores = json.loads((RESULTS / f"{place}.json").read_text())["scores"]
        return {"label": label, "key": key, "score": scores[key]}

    def _outputs(self) -> list[dict[str, str]]:
        """Returns what was said of three examples, a quarter, a half and three quarters into the test split."""
        shown = self._task.outputs
        rows = rows_of(self._runs / (shown.run or self._name), shown.file)
        picked = [len(rows) * quarter // 4 for quarter in (1, 2, 3)]
        return [
            {
                "given": self._given(rows[i], i),
                "wanted": _cut(rows[i][shown.wanted]),
                "said": _cut(rows[i][shown.said]),
            }
            for i in picked
        ]

    def _given(self, row: dict[str, Any], index: int) -> str:
        shown = self._task.outputs
        if shown.given is None:
            return f"number {index + 1}"
        text = row[shown.given]
        # What is continued is told by its end.
        is_cut = shown.is_continued and len(text) > _LONGEST
        return f"…{text[-_LONGEST:]}" if is_cut else _cut(text)


def rows_of(workdir: pathlib.Path, name: str) -> list[dict[str, Any]]:
    """Returns what an evaluation of a run kept of each example, the newest of that name.

    Raises:
      errors.UserError: there is none.
    """
    files = sorted(workdir.glob(f"evaluation/*/{name}"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise errors.UserError(f"nothing wrote {workdir}/evaluation/STEP/{name}")
    # Not by `splitlines`, which ends lines at marks that JSON leaves as they are.
    return [json.loads(line) for line in files[-1].read_text().split("\n") if line]


def _cut(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    parts = value if isinstance(value, list) else [value]
    # Of a conversation what was said.
    text = " / ".join(str(part["content"] if isinstance(part, dict) else part) for part in parts)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def define_flags() -> None:
    flags.DEFINE_list("tasks", None, f"Which, or `all`: {', '.join(suite.TASKS)}.")
    flags.DEFINE_string("runs", "runs", "Folder of workdirs.")
    flags.DEFINE_boolean("again", False, "Run commands that were done before, too.")


def main() -> None:
    names = _names(command.required("tasks"))
    for name in names:
        runs = pathlib.Path(flags.FLAGS.runs).expanduser().resolve()
        row = Runner(name, suite.TASKS[name], runs, flags.FLAGS.again).run()
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {path}", flush=True)


def _names(given: Sequence[str]) -> list[str]:
    if list(given) == ["all"]:
        return list(suite.TASKS)
    for name in given:
        if name not in suite.TASKS:
            hint = errors.nearest(name, suite.TASKS)
            raise errors.UserError(f"--tasks: {name!r} is none of {', '.join(suite.TASKS)}{hint}")
    return list(given)


if __name__ == "__main__":
    command.run(main, define_flags)
