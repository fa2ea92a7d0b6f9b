"""What a model has learned and what it has forgotten for it: two tasks, before and after.

    python -m llm_jax.evaluation.forgetting --before=runs/base --after=runs/new,runs/replayed --task=perplexity \
        --old=configs/old.py --new=configs/new.py --output=forgetting.json

Each run's newest checkpoint is scored by `llm_jax.evaluate`'s task on the evaluation split of either config (or on
`--old_source` and `--new_source`). Of each run after, the differences to the one before are of the same examples, with
95% intervals: of losses, less is better; of labels and texts, the share that is right, more is.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import pathlib
import sys
import tempfile
from typing import Any

from absl import flags
import numpy as np

from llm_jax import checkpoint
from llm_jax import command
from llm_jax import config as config_lib
from llm_jax import distributed
from llm_jax import errors
from llm_jax import evaluate
from llm_jax.evaluation import bootstrap
from llm_jax.evaluation import tasks

Rows = Sequence[Mapping[str, Any]]


def score(
    workdir: str, like: config_lib.RunConfig, task: str, options: tasks.Options
) -> tuple[dict[str, Any], Rows]:
    """Returns what a task finds of a run's newest checkpoint on the data of a config, and its row of each example."""
    with tempfile.TemporaryDirectory() as folder:

        def read(step_dir: Any, meta: checkpoint.Meta) -> dict[str, Any]:
            config = evaluate.scored_like(meta.config, like)
            tasks.check(task, config)
            meta = dataclasses.replace(meta, config=config)
            # What generates loads the run itself: its files go beside the run's own.
            return evaluate.run(step_dir, meta, target, [task], options, "forgetting")[0]

        target = workdir if task in tasks.GENERATING else folder
        found = checkpoint.read_latest(workdir, None, read)
        if not distributed.is_main():
            return found, []
        path = pathlib.Path(target) / "evaluation" / str(found["step"]) / f"{task}-forgetting.jsonl"
        rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    return found, rows


def values_of(rows: Rows) -> np.ndarray:
    """Returns what each example contributes: its loss, or whether what was said is what was wanted."""
    return np.array(
        [row["loss"] if "loss" in row else row["target"] == row["prediction"] for row in rows],
        np.float64,
    )


def compare(before: Rows, after: Rows) -> dict[str, Any]:
    """Returns the mean difference of the same examples (after less before), its interval and a p-value."""
    difference, p_value = bootstrap.difference(values_of(after), values_of(before))
    return dataclasses.asdict(difference) | {"p_value": p_value}


def table(report: Mapping[str, Any]) -> str:
    """Returns a report as a table in Markdown."""
    lines = [
        f"| run | {report['score']} on the old | difference | on the new | difference |",
        "|---|---|---|---|---|",
    ]
    for workdir, found in report["runs"].items():
        cells = [workdir]
        for side in ("old", "new"):
            cells.append(str(bootstrap.Estimate(**found[side]["scores"][report["score"]])))
            change = found[side].get("difference")
            cells.append(
                "" if change is None else f"{change['value']:+.4f} (p {change['p_value']:.3f})"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def define_flags() -> None:
    flags.DEFINE_string("before", None, "Run, or converted model, before.")
    flags.DEFINE_list("after", None, "Runs after, by commas.")
    flags.DEFINE_string("task", "perplexity", "Of llm_jax.evaluate.")
    for side in ("old", "new"):
        flags.DEFINE_string(side, None, f"Config file of the {side} task, FILE[:arg].")
        flags.DEFINE_string(f"{side}_source", None, "Its data, instead of the evaluation split.")
    flags.DEFINE_string("output", None, "JSON file of the report.")
    flags.DEFINE_integer("max_tokens", None, "Of generation: of a text.", 1)
    command.define_processes()


def main() -> None:
    given = flags.FLAGS
    before, after = command.required("before"), command.required("after")
    options = tasks.Options(max_tokens=given.max_tokens)
    likes = {side: _like(side) for side in ("old", "new")}
    runs: dict[str, Any] = {}
    first: dict[str, Rows] = {}
    for workdir in (before, *after):
        runs[workdir] = {}
        for side, like in likes.items():
            found, rows = score(workdir, like, given.task, options)
            runs[workdir][side] = {"step": found["step"], "scores": found["scores"]}
            if workdir != before and distributed.is_main():
                runs[workdir][side]["difference"] = compare(first[side], rows)
            first.setdefault(side, rows)
    if not distributed.is_main():
        return
    name = next(iter(runs[before]["old"]["scores"]))
    report = {"task": given.task, "score": name, "runs": runs}
    print(table(report), file=sys.stderr)
    if given.output is not None:
        pathlib.Path(given.output).expanduser().write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def _like(side: str) -> config_lib.RunConfig:
    config = command.load_config(command.required(side))
    source = getattr(flags.FLAGS, f"{side}_source")
    if source is None:
        return config
    if not source:
        raise errors.UserError(f"--{side}_source is empty: name data, or leave it out")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, eval_source=source))


if __name__ == "__main__":
    command.run(main, define_flags)
