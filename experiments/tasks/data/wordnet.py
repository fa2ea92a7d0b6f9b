"""WordNet's files (wndb(5WN)): synsets, their glosses, what points where, and which sense of a word comes first."""

from collections.abc import Iterator
import dataclasses
import re

PARTS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}

Key = tuple[str, int]  # part of speech and place in its file


@dataclasses.dataclass(frozen=True)
class Pointer:
    """What one synset, or one word of it, says of another.

    Attributes:
      symbol: of the relation, as `@` for what the synset is a kind of.
      key: of the other synset.
      source, target: numbers of words from 1; 0 where it is said of all words.
    """

    symbol: str
    key: Key
    source: int
    target: int


@dataclasses.dataclass(frozen=True)
class Synset:
    """Words of one meaning, with spaces; the gloss without its examples."""

    key: Key
    words: tuple[str, ...]
    gloss: str
    pointers: tuple[Pointer, ...]


def synsets(data_file: str) -> Iterator[Synset]:
    """Yields the synsets of a file `data.PART`."""
    for line in data_file.splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields, _, gloss = line.partition(" | ")
        place, _, kind, count, *rest = fields.split()
        num_words = int(count, 16)
        # Adjectives say in brackets where they stand in a sentence.
        words = tuple(
            re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in rest[: 2 * num_words : 2]
        )
        found = rest[2 * num_words + 1 :]
        pointers = []
        for i in range(0, 4 * int(rest[2 * num_words]), 4):
            symbol, target, part, numbers = found[i : i + 4]
            ends = int(numbers[:2], 16), int(numbers[2:], 16)
            pointers.append(Pointer(symbol, (part.replace("s", "a"), int(target)), *ends))
        key = (kind.replace("s", "a"), int(place))  # s: an adjective near another one
        yield Synset(key, words, gloss_of(gloss), tuple(pointers))


def gloss_of(gloss: str) -> str:
    """Returns a gloss without the examples, in quotes, that follow it."""
    return re.split(r';\s*"', gloss.strip())[0].strip().rstrip(";")


def first_senses(index_file: str) -> dict[str, Key]:
    """Returns the first sense, which is the most frequent one, of each word (lower case) of `index.PART`."""
    found = {}
    for line in index_file.splitlines():
        if line.startswith("  "):
            continue
        word, part, num_senses, *rest = line.split()
        found[word.replace("_", " ")] = (part, int(rest[-int(num_senses)]))
    return found
