"""What a model writes after the beginning of files: `python -m experiments.tasks.complete --workdir=RUN`.

Of each file of a data set's test split the first lines are given, and greedily continued; the rest of the file is what
was wanted. Keeps all of it in WORKDIR/evaluation/STEP/completion-test.jsonl and prints, as JSON, how often the first line
that is written is the file's own, and chrF of as many characters as were written.
"""

import dataclasses
import json
import pathlib
import sys

from absl import flags
import numpy as np

from experiments.tasks import baselines
from llm_jax import command
from llm_jax.evaluation import bootstrap
from llm_jax.evaluation import files
from llm_jax.evaluation import metrics
from llm_jax.sampling import generate
from llm_jax.sampling import load
from llm_jax.sampling import samplers

NAME = "completion-test"


def halves(text: str, num_lines: int) -> tuple[str, str] | None:
    """Returns the first lines of a file and the rest; None of a file without a rest."""
    lines = text.splitlines(keepends=True)
    before, after = "".join(lines[:num_lines]), "".join(lines[num_lines:])
    return (before, after) if after.strip() else None


def first_line(text: str) -> str:
    """Returns the first line of a text that says something."""
    return next((line.strip() for line in text.split("\n") if line.strip()), "")


def score(rows: list[dict[str, str]]) -> dict[str, dict]:
    """Returns the scores of what was said for what was wanted."""
    is_same = [first_line(row["prediction"]) == first_line(row["target"]) for row in rows]
    said = [row["prediction"] for row in rows]
    wanted = [row["target"][: len(row["prediction"])] for row in rows]
    found = {
        "first_line": bootstrap.of_mean(np.array(is_same)),
        "chrf": metrics.texts(said, wanted).estimates["chrf"],
    }
    return {name: dataclasses.asdict(one) for name, one in found.items()}


def define_flags() -> None:
    command.define_workdir("Folder of the run that writes.")
    flags.DEFINE_string("data", "python_code", "Data set, as experiments.tasks.data names it.")
    flags.DEFINE_integer("lines", 24, "Of each file, given.", 1)
    flags.DEFINE_integer("max_tokens", 48, "Written for each file.", 1)


def main() -> None:
    given = flags.FLAGS
    workdir = pathlib.Path(command.required("workdir")).expanduser()
    found = [halves(row["text"], given.lines) for row in baselines.read(given.data, "test")]
    pairs = [pair for pair in found if pair is not None]
    loaded = load.load(str(workdir))
    completions = generate.generate(
        loaded,
        [generate.Prompt(before) for before, _ in pairs],
        samplers.SamplingParams(temperature=0.0),
        max_tokens=given.max_tokens,
        batch_size=4,
    )
    rows = [
        {"before": before, "target": after[:1000], "prediction": one.completion}
        for (before, after), one in zip(pairs, completions, strict=True)
    ]
    scores = score(rows)
    for name, one in scores.items():
        print(f"{name:12} {bootstrap.Estimate(**one)}", file=sys.stderr)
    result = {"task": "completion", "examples": len(rows), "scores": scores}
    files.write(str(workdir), loaded.step, NAME, result, rows)
    print(json.dumps(result))


if __name__ == "__main__":
    command.run(main, define_flags)
