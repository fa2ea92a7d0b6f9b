"""Relations between the words of a sentence, as WordNet has them, and what the words are.

Source: WordNet 3.0 (its own free licence), as Debian packages it. Sentences are of two kinds:

    gloss   a term and its gloss, as written. Its words that are nouns and nothing else are entities; each stands to
            the term in a relation of WordNet's, or in none that it has. "Kind of" holds from any height
    pair    two terms, in either order, one of them with its gloss. What stands between them says nothing of the
            relation: a template is drawn without looking at it. For five pairs there is one that has none, of two
            kinds of the same thing or of any two terms by turns

Fields: `words`; `labels`, BIO tags of entities (noun, verb, adjective); `relations`, each [[start, end], name,
[start, end]] in words, the end not included: what is judged is listed, with the name `none` where nothing holds.
The names read from the first to the second: `kind_of`, `instance_of`, `part_of`, `member_of`, `substance_of`,
`entails`, `causes`, `opposite_of`; the last one and `none` begin with what stands first.

A pair of synsets is in one split: that of one of the two, which owns it (the kind, the part, what entails; of equals
the first), by the hash of its place. A sentence of pairs of several splits is left out. A synset is the second of
four pairs at the most, or texts of the commonest ones would be in all splits.
"""

from collections.abc import Iterable
from collections.abc import Mapping
import functools
import hashlib
import random
import re

from experiments.tasks.data import splits
from experiments.tasks.data import wordnet
from llm_jax.data import packages

_NAMES = {
    "@": "kind_of",
    "@i": "instance_of",
    "#p": "part_of",
    "#m": "member_of",
    "#s": "substance_of",
    "*": "entails",
    ">": "causes",
    "!": "opposite_of",
}
_TYPES = {"n": "noun", "v": "verb", "a": "adjective"}
_SHARES = {"validation": 0.05, "test": 0.05}
_MOST_OF_A_TAIL = 4
_NONE_EVERY = 5
_LONGEST = 48  # words of a sentence
_LONGEST_ENTITY = 4
_SHORTEST_ENTITY = 3  # letters: "a" and "or" are nouns, too
_IN_GLOSS = ("{0} : {1}", "{0} is {1}", "{0} means {1}")
_IN_PAIR = (
    "{0} ( {1} ) and {2}",
    "{0} , {1} ; {2}",
    "between {2} and {0} ( {1} )",
    "{2} , and {0} : {1}",
)

Tree = Mapping[wordnet.Key, wordnet.Synset]


def words_of(text: str) -> list[str]:
    """Returns words and punctuation marks; words keep their hyphens, apostrophes and inner dots."""
    return re.findall(r"\w+(?:['’.-]\w+)*|[^\w\s]", text)


def ancestors(tree: Tree) -> dict[wordnet.Key, frozenset[wordnet.Key]]:
    """Returns of what each synset is a kind, or an instance, from any height."""
    found: dict[wordnet.Key, frozenset[wordnet.Key]] = {}
    for root in tree:
        # By a list, not by recursion. WordNet has a circle of two verbs: what is on the way counts once.
        way, seen = [root], set()
        while way:
            above = {p.key for p in tree[way.pop()].pointers if p.symbol in ("@", "@i")}
            for key in above - seen:
                seen.add(key)
                if key in found:
                    seen |= found[key]
                else:
                    way.append(key)
        found[root] = frozenset(seen - {root})
    return found


@functools.cache
def split_of(key: wordnet.Key) -> str:
    """Returns the split of the pairs that a synset owns."""
    name = f"{key[0]}{key[1]}"
    (split,) = (
        split for split, rows in splits.by_key([{}], lambda _: name, _SHARES).items() if rows
    )
    return split


def pairs_of(tree: Tree) -> dict[frozenset[wordnet.Key], tuple[wordnet.Key, str, wordnet.Key]]:
    """Returns the relation of each pair of synsets between which there is one, and no other one; heads own them."""
    found: dict = {}
    for synset in tree.values():
        for pointer in synset.pointers:
            ends = (synset.key, pointer.key)
            if pointer.symbol not in _NAMES or not all(key in tree for key in ends):
                continue
            if pointer.symbol == "!":
                ends = tuple(sorted(ends))
            found.setdefault(frozenset(ends), set()).add((ends[0], _NAMES[pointer.symbol], ends[1]))
    return {pair: min(said) for pair, said in found.items() if len(said) == 1 and len(pair) == 2}


def lexicon_of(tree: Tree) -> dict[str, set[wordnet.Key]]:
    """Returns the synsets of each word, as it is spelled, that is a noun and nothing else."""
    found: dict[str, set[wordnet.Key]] = {}
    others = {word.lower() for s in tree.values() if s.key[0] != "n" for word in s.words}
    for synset in tree.values():
        for word in synset.words if synset.key[0] == "n" else ():
            if word.lower() not in others and len(word) >= _SHORTEST_ENTITY:
                found.setdefault(word, set()).add(synset.key)
    return found


class Glosses:
    """Sentences of a term and its gloss.

    Args:
      tree: synsets by their key.
      above: their `ancestors`.
    """

    def __init__(self, tree: Tree, above: Mapping[wordnet.Key, frozenset[wordnet.Key]]):
        self._tree = tree
        self._pairs = pairs_of(tree)
        self._above = above
        self._lexicon = lexicon_of(tree)

    def example(self, synset: wordnet.Synset) -> tuple[str, splits.Example] | None:
        """Returns a split and the sentence, or None where nothing holds in it, or it would be in two splits."""
        drawn = random.Random(f"gloss {synset.key}")
        texts = [words_of(synset.words[0]), words_of(synset.gloss)]
        words, (term, gloss) = _filled(drawn.choice(_IN_GLOSS), texts)
        relations, spans, owners = [], [(term, "noun")], set()
        for span in self._entities(words, gloss, {word.lower() for word in synset.words}):
            text = " ".join(words[slice(*span)])
            said = {self._said(synset.key, other) for other in self._lexicon[text]}
            spans.append((span, "noun"))
            said -= {None}
            if len(said) > 1:  # its senses disagree: not judged
                continue
            for name, is_first, owner in said or {("none", True, None)}:
                relations.append([term, name, span] if is_first else [span, name, term])
                owners |= {split_of(owner)} if owner else set()
        if len(owners) != 1 or len(words) > _LONGEST:
            return None
        return owners.pop(), _record("gloss", words, spans, relations)

    def _said(self, term: wordnet.Key, other: wordnet.Key) -> tuple[str, bool, wordnet.Key] | None:
        """Returns a relation, whether the term is its first end, and whose it is."""
        if frozenset((term, other)) in self._pairs:
            head, name, _ = self._pairs[frozenset((term, other))]
            is_first = head == term or name == "opposite_of"
            return name, is_first, head
        for low, high in ((term, other), (other, term)):
            if high in self._above[low]:
                is_instance = any(pointer.symbol == "@i" for pointer in self._tree[low].pointers)
                return "instance_of" if is_instance else "kind_of", low == term, low
        return None

    def _entities(
        self, words: list[str], place: list[int], without: set[str]
    ) -> Iterable[list[int]]:
        start, end = place
        while start < end:
            longest = min(_LONGEST_ENTITY, end - start)
            for stop in range(start + longest, start, -1):
                text = " ".join(words[start:stop])
                if text in self._lexicon and text.lower() not in without:
                    yield [start, stop]
                    break
            else:
                stop = start + 1
            start = stop


def pair_examples(
    tree: Tree, above: Mapping[wordnet.Key, frozenset[wordnet.Key]]
) -> list[tuple[str, splits.Example]]:
    """Returns a split and a sentence for pairs of synsets, and for pairs of which nothing is said."""
    pairs, counts = pairs_of(tree), {}
    chosen = []
    for head, name, tail in sorted(pairs.values(), key=_digest):
        if counts.setdefault(tail, 0) < _MOST_OF_A_TAIL:
            counts[tail] += 1
            chosen.append((head, name, tail))
    drawn = random.Random("pairs")
    terms = {
        part: [end for pair in chosen for end in pair[::2] if end[0] == part] for part in _TYPES
    }
    below: dict[wordnet.Key, list[wordnet.Key]] = {}
    for head, name, tail in chosen:
        if name == "kind_of":
            below.setdefault(tail, []).append(head)
    for i, (head, name, tail) in enumerate(chosen[::_NONE_EVERY]):
        is_sibling = name == "kind_of" and i % 2 == 0
        other = drawn.choice(below[tail] if is_sibling else terms[head[0]])
        is_said = frozenset((head, other)) in pairs or head == other
        if not (is_said or head in above[other] or other in above[head]):
            chosen.append((head, "none", other))
    found: dict[frozenset[wordnet.Key], tuple[str, splits.Example]] = {}
    for head, name, tail in chosen:
        made = _pair(tree, head, name, tail)
        if made:
            found.setdefault(frozenset((head, tail)), (split_of(head), made))
    return list(found.values())


def _pair(tree: Tree, head: wordnet.Key, name: str, tail: wordnet.Key) -> splits.Example | None:
    drawn = random.Random(f"pair {head} {tail}")
    ends = [tree[head], tree[tail]]
    # Antonyms are of words, not of meanings.
    terms = [end.words[0] for end in ends]
    for pointer in ends[0].pointers:
        if pointer.key == tail and pointer.symbol == "!" and name == "opposite_of":
            terms = [ends[0].words[pointer.source - 1], ends[1].words[pointer.target - 1]]
            break
    if terms[0].lower() == terms[1].lower():
        return None
    explained = drawn.randrange(2)
    texts = [terms[explained], ends[explained].gloss, terms[1 - explained]]
    words, spans = _filled(drawn.choice(_IN_PAIR), [words_of(text) for text in texts])
    if len(words) > _LONGEST:
        return None
    first, second = (spans[0], spans[2]) if explained == 0 else (spans[2], spans[0])
    if name in ("opposite_of", "none"):
        first, second = sorted((first, second))
    kinds = [
        (spans[0], _TYPES[ends[explained].key[0]]),
        (spans[2], _TYPES[ends[1 - explained].key[0]]),
    ]
    return _record("pair", words, kinds, [[first, name, second]])


def _filled(template: str, texts: list[list[str]]) -> tuple[list[str], list[list[int]]]:
    """Returns the words of a template with texts in it, and where each text is."""
    words: list[str] = []
    spans: list[list[int]] = [[] for _ in texts]
    for part in template.split():
        place = re.fullmatch(r"\{(\d)\}", part)
        added = texts[int(place[1])] if place else [part]
        if place:
            spans[int(place[1])] = [len(words), len(words) + len(added)]
        words += added
    return words, spans


def _record(
    kind: str, words: list[str], spans: list[tuple[list[int], str]], relations: list
) -> splits.Example:
    labels = ["O"] * len(words)
    for (start, end), name in spans:
        labels[start:end] = [f"B-{name}"] + [f"I-{name}"] * (end - start - 1)
    return {"words": words, "labels": labels, "relations": relations, "kind": kind}


def _digest(pair: tuple) -> bytes:
    return hashlib.sha256(repr(pair).encode()).digest()


def examples_of(tree: Tree) -> dict[str, list[splits.Example]]:
    """Returns the sentences of each split, in an order drawn once."""
    above = ancestors(tree)
    glosses = Glosses(tree, above)
    made = [glosses.example(synset) for synset in tree.values() if synset.key[0] == "n"]
    found: dict[str, list[splits.Example]] = {name: [] for name in splits.NAMES}
    for split, example in sorted([*filter(None, made), *pair_examples(tree, above)], key=_digest):
        found[split].append(example)
    return found


def load() -> splits.DataSet:
    """Returns the data set; downloads WordNet if need be."""
    folder = packages.apt("wordnet-base") / "usr/share/wordnet"
    files = [folder / f"data.{wordnet.PARTS[part]}" for part in _TYPES]
    tree = {
        synset.key: synset
        for file in files
        for synset in wordnet.synsets(file.read_text(encoding="utf-8"))
    }
    about = {
        "source": f"wordnet-base {packages.apt_version('wordnet-base')}, as Debian packages it",
        "licence": "WordNet 3.0",
        "split": "by the synset that owns a pair: 90% train, 5% validation, 5% test",
    }
    return splits.DataSet(examples_of(tree), about, lambda example: " ".join(example["words"]))
