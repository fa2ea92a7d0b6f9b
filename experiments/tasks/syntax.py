"""Does a file still parse with what a model wrote into its hole? `python -m experiments.tasks.syntax --workdir=RUN`.

Reads what `llm_jax.evaluate --tasks=generation` kept of `python_fill`'s test split, puts each text into the whole
file of the standard library that the hole was cut from, and prints the share that parses, beside that of nothing
written at all, as JSON. The Python that runs must be the one that the data were made of.
"""

import ast
import dataclasses
import json
import pathlib
import sys
import sysconfig
import warnings

from absl import flags
import numpy as np

from experiments.tasks import baselines
from experiments.tasks import run
from llm_jax import command
from llm_jax import errors
from llm_jax.evaluation import bootstrap
from llm_jax.evaluation import metrics

FILE = "generation-python_fill-test.jsonl"


def parses(text: str) -> bool:
    """Returns whether a text is a module of Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that are going away
            ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def filled(file: str, start: int, end: int, middle: str) -> str:
    """Returns a file whose lines from `start` to `end`, from 0, the last not included, are another text."""
    lines = file.splitlines(keepends=True)
    is_ended = not middle or middle.endswith("\n")
    return "".join([*lines[:start], middle, "" if is_ended else "\n", *lines[end:]])


def score(holes: list[dict], said: list[str], library: pathlib.Path) -> dict:
    """Returns the scores of texts for holes, in their order.

    Raises:
      errors.UserError: a file is not what it was when the holes were cut.
    """
    written, empty = [], []
    for hole, text in zip(holes, said, strict=True):
        path = library / hole["path"]
        file = path.read_text(encoding="utf-8", errors="ignore") if path.is_file() else ""
        cut = "".join(file.splitlines(keepends=True)[hole["start"] : hole["end"]])
        if cut != hole["middle"]:
            raise errors.UserError(
                f"{path} is not the file that {hole['path']} was: make the data again by python -m"
                " experiments.tasks.data python_fill, with this Python"
            )
        place = (file, hole["start"], hole["end"])
        written.append(parses(filled(*place, text)))
        empty.append(parses(filled(*place, "")))
    exact = [text.strip() == hole["middle"].strip() for hole, text in zip(holes, said, strict=True)]
    texts = metrics.texts([text.strip() for text in said], [h["middle"].strip() for h in holes])
    found = {
        "syntax": bootstrap.of_mean(np.array(written)),
        "syntax_of_nothing": bootstrap.of_mean(np.array(empty)),
        "exact_match": bootstrap.of_mean(np.array(exact)),
        "chrf": texts.estimates["chrf"],
    }
    return {name: dataclasses.asdict(one) for name, one in found.items()}


def define_flags() -> None:
    command.define_workdir("Folder of the run whose texts are checked.")
    flags.DEFINE_string("data", "python_fill", "Data set, as experiments.tasks.data names it.")


def main() -> None:
    rows = run.rows_of(pathlib.Path(command.required("workdir")).expanduser(), FILE)
    holes = baselines.read(flags.FLAGS.data, "test")
    if [row["target"] for row in rows] != [hole["middle"] for hole in holes]:
        raise errors.UserError(
            f"{FILE} is not of the test split of {flags.FLAGS.data}: score the run again by"
            " python -m llm_jax.evaluate --tasks=generation"
        )
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    scores = score(holes, [row["prediction"] for row in rows], library)
    for name, one in scores.items():
        print(f"{name:20} {bootstrap.Estimate(**one)}", file=sys.stderr)
    print(json.dumps({"task": "syntax", "examples": len(rows), "scores": scores}))


if __name__ == "__main__":
    command.run(main, define_flags)
