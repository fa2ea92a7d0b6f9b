"""Passages of the State of the Union addresses, and the half century they are from.

Source: `tfds:state_of_the_union`, which this package holds (CC0), of which the addresses up to 1989. Labels are of the
year. A passage is a sentence, or a stretch of one, of 60 to 120 bytes. Addresses are not torn apart between splits.
"""

from collections.abc import Iterator
import json
import lzma
import re

from experiments.tasks.data import splits
from llm_jax.data.builders.state_of_the_union import state_of_the_union_dataset_builder as builder

_LONGEST, _SHORTEST = 120, 60  # bytes of a passage
_LAST_YEAR = 1989  # of the training split
_PER_ADDRESS = 60  # long addresses are cut at this many


def era_of(year: int) -> str:
    """Returns the label of a year: the first one of its half century; what is earlier is with 1800."""
    return str(max(year // 50 * 50, 1800))


def passages_of(text: str) -> Iterator[str]:
    """Yields sentences, cut between words where they are too long; what is too short is left out."""
    for sentence in re.split(r"(?<=[.!?;])\s+", " ".join(text.split())):
        while len(sentence.encode()) > _LONGEST:
            end = sentence.rfind(" ", 0, _LONGEST)
            if end <= 0:
                break
            yield sentence[:end]
            sentence = sentence[end + 1 :]
        if _SHORTEST <= len(sentence.encode()) <= _LONGEST:
            yield sentence


def load() -> splits.DataSet:
    """Returns the data set; downloads nothing."""
    with lzma.open(builder.DATA_FILE, "rt", encoding="utf-8") as lines:
        addresses = [json.loads(line) for line in lines]
    examples = [
        {"text": passage, "label": era_of(one["year"]), "address": f"{one['year']} {one['name']}"}
        for one in addresses
        if one["year"] <= _LAST_YEAR
        for passage in list(passages_of(one["text"]))[:_PER_ADDRESS]
    ]
    about = {
        "source": "tfds:state_of_the_union, 1790 to 1989",
        "licence": "CC0-1.0",
        "split": "by the hash of the address: 80% train, 10% validation, 10% test",
    }
    shares = {"validation": 0.1, "test": 0.1}
    kept = splits.by_key(examples, lambda one: one["address"], shares)
    return splits.DataSet(kept, about, lambda one: one["text"])
