"""Definitions: "What is X?" and what WordNet or FOLDOC says, to be written or to be found in a text.

Sources: WordNet 3.0 (its own free licence; Fellbaum 1998) and the Free On-line Dictionary of Computing (GFDL), both
as Debian packages them. Split by the term, in lower case: no term is asked for in two splits.

    definitions   question, answer: the gloss of a term's first sense, without its examples
    spans         question, context, answer {text, answer_start}: the context has definitions of the term and of four
                  others of the same split, "TERM: GLOSS." each, and the answer is the gloss of the one asked for. A
                  rule that looks for the term finds it: what is to be learned is to point, not to understand
"""

from collections.abc import Iterator
from collections.abc import Sequence
import gzip
import random
import re

from experiments.tasks.data import splits
from experiments.tasks.data import wordnet as wordnet_lib
from llm_jax.data import packages

_FEWEST, _MOST = 3, 40  # words of an answer
_NUM_OTHERS = 4
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def wordnet(data_file: str, index_file: str) -> Iterator[tuple[str, str]]:
    """Yields terms and glosses of a part of speech: a synset's first word that means it before all else."""
    first = wordnet_lib.first_senses(index_file)
    for synset in wordnet_lib.synsets(data_file):
        words = [word for word in synset.words if first[word.lower()] == synset.key]
        if words:
            yield words[0], synset.gloss


def foldoc(index: str, text: bytes) -> Iterator[tuple[str, str]]:
    """Yields terms and the first sentences of a dictd dictionary, an entry once: places are numbers of base 64.

    An entry begins with lines of what it is found by; the first is the term. What is set in is its text.
    """
    seen = set()
    for line in index.splitlines():
        word, start, length = line.split("\t")
        if word.startswith("00-database") or start in seen:
            continue
        seen.add(start)
        entry = text[_number(start) : _number(start) + _number(length)].decode("utf-8", "replace")
        heads, _, body = entry.strip("\n").partition("\n\n")
        heads = heads.splitlines()
        if any(head[:1].isspace() for head in heads) or not body[:1].isspace():
            continue
        paragraph = " ".join(re.split(r"\n\s*\n", body)[0].split())
        # Before the text: its field, other spellings of the term, how it is spoken.
        paragraph = re.sub(r"^((<[^>]*>|\([^()]*\)|/[^/ ]+/)\s*)+", "", paragraph)
        paragraph = re.sub(r"[{}]", "", paragraph)
        sentence = re.match(r"(.+?(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)(?<! [A-Z])\.)(\s|$)", paragraph)
        if sentence:
            yield heads[0].strip(), sentence[1].rstrip(".")


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + _DIGITS.index(digit)
    return value


def examples_of(pairs: Iterator[tuple[str, str]]) -> list[splits.Example]:
    """Returns a question and an answer for each term, by the first of its glosses that is fit."""
    found: dict[str, splits.Example] = {}
    for term, gloss in pairs:
        size = len(gloss.split())
        if term.lower() not in found and _FEWEST <= size <= _MOST:
            found[term.lower()] = {"question": f"What is {term}?", "answer": gloss, "term": term}
    return list(found.values())


def _pairs() -> Iterator[tuple[str, str]]:
    folder = packages.apt("wordnet-base") / "usr/share/wordnet"
    for part in wordnet_lib.PARTS.values():
        files = [folder / f"{kind}.{part}" for kind in ("data", "index")]
        yield from wordnet(*(file.read_text(encoding="utf-8") for file in files))
    folder = packages.apt("dict-foldoc") / "usr/share/dictd"
    with gzip.open(folder / "foldoc.dict.dz") as file:
        text = file.read()
    yield from foldoc((folder / "foldoc.index").read_text(encoding="utf-8"), text)


def _about(split: str) -> dict[str, str]:
    names = ("wordnet-base", "dict-foldoc")
    versions = " and ".join(f"{name} {packages.apt_version(name)}" for name in names)
    return {
        "source": f"{versions}, as Debian packages them",
        "licence": "WordNet 3.0; GFDL",
        "split": split,
    }


def definitions() -> splits.DataSet:
    """Returns questions and answers; downloads the dictionaries if need be."""
    examples = splits.by_key(
        examples_of(_pairs()),
        lambda example: example["term"].lower(),
        {"validation": 0.02, "test": 0.02},
    )
    about = _about("by the term, lower case: 96% train, 2% validation, 2% test")
    return splits.DataSet(examples, about, lambda example: example["answer"])


def spans() -> splits.DataSet:
    """Returns questions, contexts and where the answer is in them."""
    found, leaks = splits.without_leaks(definitions())
    examples = {name: spans_of(rows, seed=name) for name, rows in found.items()}
    about = _about("as `definitions`, contexts of one split's terms alone") | {"definitions": leaks}
    return splits.DataSet(examples, about, lambda example: example["answer"]["text"])


def spans_of(rows: Sequence[splits.Example], seed: str) -> list[splits.Example]:
    """Returns for each definition a context of it and of others, in an order drawn by `seed`."""
    drawn = random.Random(seed)
    examples = []
    for row in rows:
        others = drawn.sample(rows, min(len(rows), _NUM_OTHERS + 1))
        chosen = [other for other in others if other["term"] != row["term"]][:_NUM_OTHERS]
        chosen.insert(drawn.randrange(len(chosen) + 1), row)
        context, start = "", 0
        for one in chosen:
            context += f"{one['term']}: "
            if one is row:
                start = len(context)
            context += f"{one['answer']}. "
        answer = {"text": row["answer"], "answer_start": start}
        example = {"question": row["question"], "context": context.strip(), "answer": answer}
        examples.append(example | {"term": row["term"]})
    return examples
