"""Downloads and writes a data set: `python -m experiments.tasks.data NAME [--output=FOLDER]`."""

import json
import pathlib

from absl import flags

from experiments.tasks.data import debian
from experiments.tasks.data import definitions
from experiments.tasks.data import dialogue
from experiments.tasks.data import marked
from experiments.tasks.data import newsgroups
from experiments.tasks.data import passages
from experiments.tasks.data import python_code
from experiments.tasks.data import relations
from experiments.tasks.data import sentiment
from experiments.tasks.data import spam
from experiments.tasks.data import splits
from llm_jax import command
from llm_jax import errors

FOLDER = pathlib.Path.home() / ".cache" / "llm_jax" / "tasks"
DATA_SETS = {
    "newsgroups": newsgroups.load,
    "spam": spam.load,
    "sentiment": sentiment.load,
    "summaries": debian.summaries,
    "descriptions": debian.descriptions,
    "definitions": definitions.definitions,
    "spans": definitions.spans,
    "relations": relations.load,
    "relation_pairs": marked.pairs,
    "conversations": dialogue.conversations,
    "preferences": dialogue.preferences,
    "passages": passages.load,
    "python_code": python_code.code,
    "python_fill": python_code.fill,
}


def load(name: str) -> splits.DataSet:
    """Returns a data set by its name; raises UserError."""
    kind, _, argument = name.partition(":")
    if kind == "translation" and argument:
        try:
            return debian.translation(argument)
        except ValueError as error:
            raise errors.UserError(str(error)) from error
    if name not in DATA_SETS:
        known = [*DATA_SETS, "translation:it"]
        raise errors.UserError(
            f"{name!r} is none of {', '.join(known)}{errors.nearest(name, known)}"
        )
    return DATA_SETS[name]()


def define_flags() -> None:
    command.define_argument("NAME", f"What: {', '.join(DATA_SETS)}, translation:LANGUAGE.")
    flags.DEFINE_string("output", str(FOLDER), "Folder that gets one of this name.")


def main() -> None:
    name = command.argument("NAME")
    folder = pathlib.Path(flags.FLAGS.output).expanduser() / name.replace(":", "_")
    about = splits.write(folder, load(name))
    print(json.dumps({"folder": str(folder)} | about, indent=1))


if __name__ == "__main__":
    command.run(main, define_flags)
