"""Splits without leaks: by a key that several examples share, and without near-duplicates across them.

Which split a key is in follows from its hash, so that it does not change as data grow.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

NAMES = ("train", "validation", "test")
_NGRAM = 8  # words
_LARGEST_OVERLAP = 0.5  # of a text's n-grams that texts of another split may have

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Examples by split, and what is said of them.

    Attributes:
      examples: of each split.
      about: source, licence and how they were split, by name.
      text_of: the text of an example that is looked for in other splits.
      is_standard: whether others' scores are of this split, so that what leaks is counted, and stays.
    """

    examples: Mapping[str, Sequence[Example]]
    about: Mapping[str, Any]
    text_of: Callable[[Example], str]
    is_standard: bool = False


def by_key(
    examples: Iterable[Example],
    key_of: Callable[[Example], str],
    shares: Mapping[str, float] | None = None,
) -> dict[str, list[Example]]:
    """Returns examples by split: those of one key are in one split.

    Args:
      examples: in an order that is kept.
      key_of: what examples share that must not be torn apart.
      shares: of validation and test; the rest is train.
    """
    shares = {"validation": 0.05, "test": 0.05} if shares is None else shares
    found: dict[str, list[Example]] = {name: [] for name in NAMES}
    for example in examples:
        digest = hashlib.sha256(key_of(example).encode()).digest()
        place, start = int.from_bytes(digest[:8], "big") / 2**64, 0.0
        split = "train"
        for name, share in shares.items():
            if start <= place < start + share:
                split = name
            start += share
        found[split].append(example)
    return found


def by_words(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Returns examples with a text by split, a tenth for validation and a fifth for test: same words, same split."""
    shares = {"validation": 0.1, "test": 0.2}
    return by_key(examples, lambda example: " ".join(words_of(example["text"])), shares)


def words_of(text: str) -> list[str]:
    """Returns the words of a text, lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def without_leaks(data: DataSet) -> tuple[dict[str, list[Example]], dict[str, Any]]:
    """Returns the examples without those that another split gives away, and what was left out.

    A training text goes whose words are those of a validation or test text, or that shares half of its
    n-grams of words with such texts; a validation text that is so much like test texts. Texts within one split
    that are the same word by word count once.
    """
    kept: dict[str, list[Example]] = {}
    seen_whole: set[str] = set()
    seen_grams: set[int] = set()
    told = {"same_words": {}, "shared_ngrams": {}, "ngram": _NGRAM, "overlap": _LARGEST_OVERLAP}
    for name in reversed(NAMES):
        own_whole: set[str] = set()
        own_grams: set[int] = set()
        kept[name], same, alike = [], 0, 0
        for example in data.examples[name]:
            words = words_of(data.text_of(example))
            whole, grams = " ".join(words), _grams(words)
            if whole in seen_whole or whole in own_whole:
                same += 1
                continue
            if grams and len(grams & seen_grams) > _LARGEST_OVERLAP * len(grams):
                alike += 1
                continue
            kept[name].append(example)
            own_whole.add(whole)
            own_grams |= grams
        seen_whole |= own_whole
        seen_grams |= own_grams
        told["same_words"][name], told["shared_ngrams"][name] = same, alike
    if data.is_standard:
        return {name: list(data.examples[name]) for name in NAMES}, told | {"is_left_out": False}
    return {name: kept[name] for name in NAMES}, told


def _grams(words: Sequence[str]) -> set[int]:
    return {hash(tuple(words[i : i + _NGRAM])) for i in range(len(words) - _NGRAM + 1)}


def write(folder: pathlib.Path, data: DataSet) -> dict[str, Any]:
    """Writes a data set, whole or not at all; returns what `about.json` says."""
    examples, leaks = without_leaks(data)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        counts, sums = {}, {}
        for name, rows in examples.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (temporary / f"{name}.jsonl").write_bytes(text.encode())
            counts[name], sums[name] = len(rows), hashlib.sha256(text.encode()).hexdigest()
        about = dict(data.about) | {"examples": counts, "sha256": sums, "leaks": leaks}
        (temporary / "about.json").write_text(json.dumps(about, indent=1) + "\n")
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return about
