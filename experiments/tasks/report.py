"""Writes the README's table of tasks from `experiments/tasks/results`: `python -m experiments.tasks.report`."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from absl import app

from experiments.tasks import suite
from llm_jax import errors
from llm_jax.evaluation import forgetting

FOLDER = pathlib.Path(__file__).parent
_BEGIN, _END = "<!-- rows: begin -->", "<!-- rows: end -->"


def results() -> dict[str, dict[str, Any]]:
    """Returns the rows that were made, in the order of the tasks."""
    paths = {name: FOLDER / "results" / f"{name}.json" for name in suite.TASKS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def rows(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table, and below it the commands and outputs of each row."""
    lines = ["| task | scores | beside | minutes: train, all |", "|---|---|---|---|"]
    for name, row in found.items():
        scores = ", ".join(
            f"{key} {_score(row['scores'][key])}" for key in _shown(name, row["scores"])
        )
        beside = "; ".join(f"{one['label']} {_value(one)}" for one in row["baselines"])
        if row["found"]:
            *others, (_, scores) = _of_runs(row["found"])
            beside = "; ".join(f"{run}: {cell}" for run, cell in others)
        seconds = row["seconds"]
        training = sum(value for stage, value in seconds.items() if stage.startswith("train"))
        minutes = f"{training / 60:.0f}, {sum(seconds.values()) / 60:.0f}"
        lines.append(f"| [{name}](#{name}): {row['title']} | {scores} | {beside} | {minutes} |")
    for name, row in found.items():
        lines += ["", f"### {name}", "", "```"]
        lines += [f"python -m {line}" for line in row["commands"]]
        count = f"{row['examples']:,} examples of the test split; " if row["examples"] else ""
        lines += ["```", "", f"{count}{row['machine']}; {row['date']}."]
        if row["found"]:
            lines += ["", forgetting.table(row["found"])]
        if row["outputs"]:
            lines += ["", "| given | wanted | said |", "|---|---|---|"]
        for output in row["outputs"]:
            cells = (_cell(output[key]) for key in ("given", "wanted", "said"))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _of_runs(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns each run of a report on forgetting, and what it scores on the old data and on the new."""
    name = found["score"]
    return [
        (run, ", ".join(f"{name} on the {key} {_score(one[key]['scores'][name])}" for key in one))
        for run, one in found["runs"].items()
    ]


def _shown(name: str, scores: Mapping[str, Any]) -> list[str]:
    wanted = suite.TASKS[name].scores if name in suite.TASKS else tuple(scores)
    missing = [key for key in wanted if key not in scores]
    if missing:
        raise errors.UserError(f"{name}: no score {missing[0]!r}; there are {', '.join(scores)}")
    return list(wanted)


def _score(score: Mapping[str, float]) -> str:
    low, high = score.get("low"), score.get("high")
    return f"{score['value']:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def _value(one: Mapping[str, Any]) -> str:
    return f"{one['score']['value']:.3f} ({one['key']})"


def _cell(text: str) -> str:
    return text.replace("\n", " ⏎ ").replace("|", "\\|").replace("<", "&lt;").strip()


def main(argv: list[str]) -> None:
    del argv
    path = FOLDER / "README.md"
    text = path.read_text()
    before, _, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise errors.UserError(f"{path} has no place for rows: {_BEGIN} and {_END}")
    path.write_text(f"{before}{_BEGIN}\n{rows(results())}{_END}{after}")
    print(f"{len(results())} rows in {path}")


if __name__ == "__main__":
    app.run(main)
