"""Conversations made of dictionaries and package descriptions, and preferences between two summaries.

Sources: as `definitions` (WordNet 3.0; GFDL) and `summaries` (each package's licence). Nobody has said these words:
questions are templates, answers are the dictionary's or the package's own.

    conversations   messages: what X is, or what a package is in a line; then a question that only the conversation
                    answers: which word, or which package, it was
    preferences     prompt, chosen, rejected: of a long description, the short one is preferred to its first sentence
"""

import random
import re

from experiments.tasks.data import debian
from experiments.tasks.data import definitions
from experiments.tasks.data import splits

_MOST_WORDS = 90  # of a long description
_TRAIN = 12_000  # of each kind
_HELD_OUT = 500

_DEFINE = ("Define: {}", "What does {} mean?", "What is {}?", "Give me the meaning of {}.")
_WHICH = ("Which word did I ask about?", "Remind me: which word was it?", "What was my word?")
_DESCRIBE = (
    "Describe this package in one line:\n{}",
    "{}\n\nSay in one line what that is.",
    "Summarise in one line: {}",
)
_PACKAGE = ("Which package is it?", "What is the package called?", "Name the package.")


def _said(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def of_definition(row: splits.Example) -> splits.Example:
    """Returns a conversation on a word."""
    drawn = random.Random(f"define {row['term']}")
    asked = drawn.choice(_DEFINE).format(row["term"])
    messages = _said(asked, row["answer"], drawn.choice(_WHICH), row["term"])
    return {"messages": messages, "kind": "word"}


def of_summary(row: splits.Example) -> splits.Example:
    """Returns a conversation on a package."""
    drawn = random.Random(f"describe {row['package']}")
    asked = drawn.choice(_DESCRIBE).format(f"{row['package']}: {row['long']}")
    messages = _said(asked, row["short"], drawn.choice(_PACKAGE), row["package"])
    return {"messages": messages, "kind": "package"}


def first_sentence(text: str) -> str:
    """Returns the first sentence of a text, or all of it."""
    return re.match(r"(.+?[.!?])(\s|$)|.+", text)[0].strip()


def _short_ones(rows: list[splits.Example]) -> list[splits.Example]:
    return [row for row in rows if len(row["long"].split()) <= _MOST_WORDS]


def _most(split: str) -> int:
    return _TRAIN if split == "train" else _HELD_OUT


def conversations() -> splits.DataSet:
    """Returns conversations of both kinds, by turns; downloads their sources if need be."""
    words, leaks = splits.without_leaks(definitions.definitions())
    packages, more_leaks = splits.without_leaks(debian.summaries())
    examples = {}
    for split in splits.NAMES:
        drawn = random.Random(split)
        made = [
            [of_definition(row) for row in words[split]],
            [of_summary(row) for row in _short_ones(packages[split])],
        ]
        kept = [drawn.sample(rows, min(_most(split), len(rows))) for rows in made]
        examples[split] = drawn.sample(sum(kept, []), sum(map(len, kept)))
    about = {
        "source": "as `definitions` and `summaries`",
        "licence": "WordNet 3.0; GFDL; each package's",
        "split": "as `definitions` and `summaries` are",
        "leaks_of_sources": {"definitions": leaks, "summaries": more_leaks},
    }
    return splits.DataSet(examples, about, lambda example: example["messages"][1]["content"])


def preferences() -> splits.DataSet:
    """Returns preferences; downloads their source if need be."""
    packages, leaks = splits.without_leaks(debian.summaries())
    examples = {}
    for split in splits.NAMES:
        examples[split] = [
            {
                "prompt": of_summary(row)["messages"][:1],
                "chosen": row["short"],
                "rejected": first_sentence(row["long"]),
            }
            for row in _short_ones(packages[split])
            if row["short"] != first_sentence(row["long"])
        ]
    about = {
        "source": "as `summaries`",
        "licence": "each package's",
        "split": "as `summaries` is",
        "leaks_of_source": leaks,
    }
    return splits.DataSet(examples, about, lambda example: example["chosen"])
