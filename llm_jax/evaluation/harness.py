"""Runs tasks of EleutherAI's lm-evaluation-harness on a checkpoint.

    python -m llm_jax.evaluation.harness --workdir=runs/llama --tasks=lambada_openai,hellaswag
    python -m llm_jax.evaluation.harness --workdir=runs/llama --tasks=mine --include_path=tasks/

Prints the harness's table and writes its results to WORKDIR/evaluation/STEP/lm_eval.json. It is installed by
`pip install -e '.[harness]'`; `harness_model` has the model that it sees.
"""

import importlib
import json
import sys
from typing import Any

from absl import flags
from etils import epath

from llm_jax import checkpoint
from llm_jax import command
from llm_jax import errors
from llm_jax.evaluation import files

FILE = "lm_eval.json"
_BATCH_SIZE = 16


def define_flags() -> None:
    command.define_workdir("Folder of the run, or of a converted model, to evaluate.")
    flags.DEFINE_string("step", None, "Checkpoint: its step, or `best`; the latest if not given.")
    flags.DEFINE_list("tasks", None, "Names of the harness's tasks or groups, by commas.")
    flags.DEFINE_string("include_path", None, "Folder of more tasks: YAML files.")
    flags.DEFINE_integer(
        "num_fewshot", None, "Examples before each question; the task's number.", 0
    )
    flags.DEFINE_integer("limit", None, "Documents of each task at most.", 1)
    flags.DEFINE_integer("batch_size", _BATCH_SIZE, "Rows read or written side by side.", 1)


def main() -> None:
    given, workdir = flags.FLAGS, command.required("workdir")
    results = run(
        workdir,
        checkpoint.parse_step(given.step),
        command.required("tasks"),
        given.include_path,
        given.num_fewshot,
        given.limit,
        given.batch_size,
    )
    utils = _imported("lm_eval.utils")
    for column in ("results", "groups"):
        if column in results:
            print(utils.make_table(results, column))
    path = write(workdir, results)
    print(f"wrote {path}", file=sys.stderr)


def run(
    workdir: str,
    step: int | str | None,
    tasks: list[str],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = _BATCH_SIZE,
) -> dict[str, Any]:
    """Returns the harness's results, as `lm_eval.simple_evaluate` gives them, samples included.

    Args:
      workdir: of the run, or of a converted model.
      step: which checkpoint, as `checkpoint.parse_step` gives it; None: the latest that is whole.
      tasks: names of tasks, groups or tags.
      include_path: folder of more tasks; None: those that the harness ships alone.
      num_fewshot: examples before each question; None: as many as the task says.
      limit: documents of each task; None: all.
      batch_size: rows that are read or written side by side.

    Raises:
      errors.UserError: no harness, no such checkpoint or task, or a request that the model cannot answer.
    """
    harness_model = _imported("llm_jax.evaluation.harness_model")
    manager = _task_manager(tasks, include_path)
    tasks = _matching(manager, tasks)
    lm = harness_model.of_workdir(workdir, step, batch_size=batch_size)
    return _imported("lm_eval.evaluator").simple_evaluate(
        model=lm,
        tasks=tasks,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        limit=limit,
        task_manager=manager,
    )


def write(workdir: str, results: dict[str, Any]) -> epath.Path:
    """Writes results but for the samples to WORKDIR/evaluation/STEP/lm_eval.json; returns the path."""
    kept = {name: value for name, value in results.items() if name != "samples"}
    default = _imported("lm_eval.utils").handle_non_serializable
    path = files.folder_of(workdir, results["config"]["step"]) / FILE
    path.write_text(json.dumps(kept, indent=2, default=default, ensure_ascii=False) + "\n")
    return path


def _imported(name: str) -> Any:
    """Returns a module of the harness, or one that needs it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise errors.UserError(
            "lm-eval is not installed: `pip install -e '.[harness]'` has it"
        ) from error


def _task_manager(names: list[str], include_path: str | None) -> Any:
    """Returns the harness's index of its tasks and of those in a folder."""
    task_manager = _imported("lm_eval.tasks").TaskManager
    if include_path is not None:
        if not epath.Path(include_path).is_dir():
            raise errors.UserError(f"--include_path={include_path} is no folder")
        own = task_manager(include_path=include_path, include_defaults=False)
        # The harness's 14,000 take 15 s to read. Groups may have some of them among their own.
        if set(names) <= set(own.all_subtasks):
            return own
    return task_manager(include_path=include_path)


def _matching(manager: Any, names: list[str]) -> list[str]:
    """Returns the tasks of names and patterns (`mmlu_*`); UserError for one that there is not."""
    for name in names:
        if not manager.match_tasks([name]):
            hint = errors.nearest(name, manager.all_tasks)
            raise errors.UserError(f"--tasks={name}: the harness has no such task{hint}")
    return manager.match_tasks(names)


if __name__ == "__main__":
    command.run(main, define_flags)
