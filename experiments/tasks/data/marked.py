"""Pairs of entities to be judged, marked in their sentence (Zhou and Chen 2022, section 3.1).

    relation_pairs   text: a sentence in which `@ ... @` and `# ... #` mark two entities; label: what holds

The entity that comes first is the one between @. A relation that holds from the second to the first has `<` before
its name; `opposite_of` and `none` hold both ways.
"""

from collections.abc import Sequence
import re

from experiments.tasks.data import relations
from experiments.tasks.data import splits

_MARKS = ("@", "#")
_REVERSED = "<"

Span = tuple[int, int]


def text(words: Sequence[str], first: Span, second: Span) -> str:
    """Returns a sentence with its two entities marked, of which the first one stands first."""
    found = []
    for place, word in enumerate(words):
        for mark, (start, end) in zip(_MARKS, (first, second), strict=True):
            if place == end:
                found.append(mark)
            if place == start:
                found.append(mark)
        found.append(word)
    for mark, (_, end) in zip(_MARKS, (first, second), strict=True):
        if end == len(words):
            found.append(mark)
    return " ".join(found)


def label(head: Span, name: str, tail: Span) -> tuple[Span, Span, str]:
    """Returns a relation's entities in the order of their places, and its label."""
    if head < tail:
        return head, tail, name
    return tail, head, name if name in ("none", "opposite_of") else _REVERSED + name


def triple(first: Span, name: str, second: Span) -> tuple[Span, str, Span]:
    """Returns the relation that a label stands for: (head, name, tail)."""
    if name.startswith(_REVERSED):
        return second, name.removeprefix(_REVERSED), first
    return first, name, second


def pairs() -> splits.DataSet:
    """Returns the pairs that `relations` judges, in its splits; downloads WordNet if need be."""
    found, leaks = splits.without_leaks(relations.load())
    examples = {}
    for split, rows in found.items():
        examples[split] = []
        for row in rows:
            for head, name, tail in row["relations"]:
                first, second, named = label(tuple(head), name, tuple(tail))
                marked = text(row["words"], first, second)
                examples[split].append({"text": marked, "label": named})
    about = dict(relations.load().about) | {"leaks_of_source": leaks}
    # Marks are what tells pairs of one sentence apart: as words, which they are not, they count.
    return splits.DataSet(
        examples,
        about,
        lambda example: re.sub("[@#]", lambda m: f"mark{ord(m[0])}", example["text"]),
    )
