"""Data sets of tasks: read as their sources have them, split without leaks, written whole and alike each time."""

import collections
import json
import random

import pytest

from experiments.tasks.data import debian
from experiments.tasks.data import definitions
from experiments.tasks.data import newsgroups
from experiments.tasks.data import passages
from experiments.tasks.data import python_code
from experiments.tasks.data import relations
from experiments.tasks.data import sentiment
from experiments.tasks.data import spam
from experiments.tasks.data import splits
from experiments.tasks.data import wordnet
from llm_jax.evaluation import metrics

WORDS = [f"w{i}" for i in range(400)]
DRY = (
    "00000012 00 s 02 dry(p) 0 bone_dry 0 002 ! 00000099 s 0102 = 00000007 n 0000"
    ' | free from liquid or moisture; "it is there"; "so"  '
)


def _synset(place, *words, part="n", gloss=None, pointers=()):
    """Returns a line of WordNet; pointers are of nouns, by symbol and place."""
    pointed = " ".join(f"{symbol} {other:08} {part} 0000" for symbol, other in pointers)
    listed = " ".join(f"{word.replace(' ', '_')} 0" for word in words)
    gloss = gloss or f"gloss of {place}"
    return f"{place:08} 03 {part} {len(words):02x} {listed} {len(pointers):03} {pointed} | {gloss}"


def _text(start, count=30):
    return " ".join(WORDS[start : start + count])


def _data(**rows):
    rows = {name: [{"text": text} for text in texts] for name, texts in rows.items()}
    return splits.DataSet({"validation": []} | rows, {"source": "x"}, lambda row: row["text"])


def test_what_another_split_gives_away_is_left_out():
    shared = _text(0)
    data = _data(
        train=[_text(300), shared.upper() + "!", _text(0, 25) + " " + _text(380, 15), _text(300)],
        validation=[_text(100), _text(40, 30)],
        test=[shared, _text(40, 30), _text(40, 30)],
    )
    kept, told = splits.without_leaks(data)
    assert [row["text"] for row in kept["train"]] == [_text(300)]
    assert [row["text"] for row in kept["validation"]] == [_text(100)]
    assert [row["text"] for row in kept["test"]] == [shared, _text(40, 30)]
    assert told["same_words"] == {"test": 1, "validation": 1, "train": 2}
    assert told["shared_ngrams"] == {"test": 0, "validation": 0, "train": 1}


def test_a_standard_split_stays_and_its_leaks_are_counted(tmp_path):
    data = _data(train=[_text(0)], test=[_text(0)])
    about = splits.write(tmp_path / "set", splits.DataSet(data.examples, {}, data.text_of, True))
    assert about["examples"] == {"train": 1, "validation": 0, "test": 1}
    assert about["leaks"]["same_words"]["train"] == 1


def test_examples_of_a_key_are_in_one_split_and_stay_there():
    rows = [{"key": f"k{i % 60}", "n": i} for i in range(600)]
    found = splits.by_key(rows, lambda row: row["key"], {"validation": 0.2, "test": 0.2})
    keys = {name: {row["key"] for row in part} for name, part in found.items()}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
    assert all(len(part) > 20 for part in found.values())
    fewer = splits.by_key(rows[:100], lambda row: row["key"], {"validation": 0.2, "test": 0.2})
    for name, part in fewer.items():
        assert {row["key"] for row in part} <= keys[name]


def test_files_are_written_alike_each_time(tmp_path):
    data = _data(train=[_text(0), "a\u2028b " + _text(50)], test=[_text(200)])
    first = splits.write(tmp_path / "set", data)
    again = splits.write(tmp_path / "set", data)
    assert first == again == json.loads((tmp_path / "set" / "about.json").read_text())
    lines = (tmp_path / "set" / "train.jsonl").read_text().split("\n")
    assert [json.loads(line)["text"] for line in lines[:-1]] == [_text(0), "a\u2028b " + _text(50)]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_descriptions_are_aligned_by_paragraph():
    english = "short one for all users\nA first paragraph that is long enough.\n.\n * a list\n.\nThe last paragraph is here too."
    italian = "uno breve per tutti gli utenti\nUn primo paragrafo abbastanza lungo.\n.\n * un elenco\n.\nAnche l'ultimo paragrafo sta qui."
    short, paragraphs = debian.description(english)
    assert short == "short one for all users"
    assert paragraphs == [
        "A first paragraph that is long enough.",
        "",
        "The last paragraph is here too.",
    ]
    pairs = list(
        debian.aligned({"m": ("pkg-bin", english)}, {"m": ("pkg-bin", italian)}, {"pkg-bin": "pkg"})
    )
    assert [(row["source"][:5], row["target"][:5]) for row in pairs] == [
        ("short", "uno b"), ("A fir", "Un pr"), ("The l", "Anche"),
    ]  # fmt: skip
    assert {row["package"] for row in pairs} == {"pkg"}
    shorter = italian.rpartition("\n.\n")[0]
    assert not list(debian.aligned({"m": ("p", english)}, {"m": ("p", shorter)}, {}))


def test_control_files_are_read_by_stanza():
    text = "Package: a-bin\nSource: a (1.2)\nDescription-md5: m1\nDescription-en: short\n long\n .\n more\n\nPackage: b\n"
    assert debian.sources_of(text) == {"a-bin": "a", "b": "b"}
    assert debian.described(text, "en") == {"m1": ("a-bin", "short\nlong\n.\nmore")}


def test_summaries_take_one_package_of_each_source():
    long = "ten words are what a long description has to have at least"
    texts = {f"m{i}": (f"p{i}", f"short text {i}\n{long} {i}") for i in range(4)}
    found = list(debian.summaries_of(texts, {"p0": "s", "p1": "s", "p2": "t"}))
    assert [(row["package"], row["short"]) for row in found] == [
        ("s", "short text 0"), ("t", "short text 2"), ("p3", "short text 3"),
    ]  # fmt: skip


def test_synsets_are_read_with_what_they_point_at():
    (found,) = wordnet.synsets(f"  1 a licence\n{DRY}\n")
    assert found.key == ("a", 12)
    assert found.words == ("dry", "bone dry")
    assert found.gloss == "free from liquid or moisture"
    assert found.pointers == (
        wordnet.Pointer("!", ("a", 99), source=1, target=2),
        wordnet.Pointer("=", ("n", 7), source=0, target=0),
    )


def test_terms_are_asked_for_by_their_first_sense():
    files = {
        "data": [_synset(1, "bank", "dog"), _synset(2, "bank", "shore"), _synset(3, "Dog")],
        "index": ["bank n 2 1 @ 2 1 00000002 00000001", "shore n 1 0 1 0 00000002",
                  "dog n 2 1 @ 2 1 00000003 00000001"],
    }  # fmt: skip
    found = definitions.wordnet(*("\n".join(["  1 a licence", *files[kind]]) for kind in files))
    # Nothing means the first synset before all else.
    assert list(found) == [("bank", "gloss of 2"), ("Dog", "gloss of 3")]


def test_a_term_has_its_first_fit_gloss():
    rows = definitions.examples_of(
        iter([("A", "one"), ("a", "a fit gloss here"), ("A", "another fit gloss")])
    )
    assert rows == [{"question": "What is a?", "answer": "a fit gloss here", "term": "a"}]


@pytest.mark.parametrize(
    "entry, wanted",
    [
        ("head\n\n   A <text> {word} that is said. And more.\n", [("head", "A <text> word that is said")]),
        ("Head\nHD\n\n   <a field> (HD) /hed/ A word,\n   e.g. this. More.\n", [("Head", "A word, e.g. this")]),
        ("head\n\n   No sentence\n\n   here. Nor\n", []),
        ("head\n   of another form.\n", []),
    ],
)  # fmt: skip
def test_dictionaries_of_dictd_are_read_by_place(entry, wanted):
    text, start = f"none\n{entry}".encode(), definitions._DIGITS[5]
    size = "".join(definitions._DIGITS[n] for n in divmod(len(entry), 64))
    # Words that an entry is found by stand in the index with the same place.
    index = f"00-database-info\tA\tB\nhead\t{start}\t{size}\nother\t{start}\t{size}\n"
    assert list(definitions.foldoc(index, text)) == wanted


def test_spans_are_where_they_are_said_to_be():
    rows = [{"question": f"What is {w}?", "term": w, "answer": f"gloss of {w}"} for w in WORDS[:20]]
    found = definitions.spans_of(rows, "seed")
    assert found == definitions.spans_of(rows, "seed")
    for row, own in zip(found, rows, strict=True):
        answer = row["answer"]
        start = answer["answer_start"]
        assert (
            row["context"][start : start + len(answer["text"])] == answer["text"] == own["answer"]
        )
        assert row["context"].count(": ") == 5
    assert len({row["context"].index(row["answer"]["text"]) for row in found}) > 5


def test_mails_have_no_headers_and_tables_no_header_lines():
    assert spam.body_of("From: me\r\nSubject: spam!\r\n\r\nbody\r\n\r\nmore\r\n") == "body\n\nmore"
    table = "Category\tText\nd\tstring\nclass\t\nalt.x\tsome text\nsci.y\tother text\n\n"
    assert newsgroups.examples_of(table) == [
        {"text": "some text", "label": "alt.x"}, {"text": "other text", "label": "sci.y"},
    ]  # fmt: skip


def test_sentences_are_labelled_by_the_sign_of_their_rating():
    table = "1\t2.5\tGood fun.\n2\t-0.1\tDull\n3\t0.0\tA film\n\n"
    assert sentiment.examples_of(table) == [
        {"text": "Good fun.", "label": "positive", "rating": 2.5},
        {"text": "Dull", "label": "negative", "rating": -0.1},
    ]


def test_the_same_words_are_in_the_same_split():
    rows = [{"text": f"{_text(i, 3)}{end}"} for i in range(200) for end in ("", "!")]
    found = splits.by_words(rows)
    for split in found.values():
        words = [splits.words_of(row["text"]) for row in split]
        assert words[::2] == words[1::2]
    assert 20 < len(found["validation"]) < 60 < len(found["test"]) < 110


def test_holes_are_what_stands_between(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "test").mkdir()
    code = "".join(f"line_{i} = {i}\n" for i in range(200))
    for name in ("one.py", "pkg/two.py", "test/three.py"):
        (tmp_path / name).write_text(code)
    files = python_code.files_of(tmp_path)
    assert [row["module"] for row in files] == ["one", "pkg"]
    holes = python_code.holes_of(files, "seed", most=100_000)
    assert holes and all(row["before"] + row["middle"] + row["after"] == code for row in holes)
    assert all(1 <= row["middle"].count("\n") <= 5 for row in holes)


@pytest.mark.parametrize("name", ["newsgroup", "translation:xx", "translation"])
def test_data_that_are_not_there_are_named(name):
    from experiments.tasks.data import __main__ as command
    from llm_jax import errors

    with pytest.raises(errors.UserError, match="newsgroups|use one of it"):
        command.load(name)


def _tree(size=400, symbols=("@", "#p", "#m", "!")):
    """Returns nouns n0, n1, ... that point at earlier ones, whose glosses name what they and others point at."""
    drawn, lines = random.Random(0), []
    for place in range(size):
        others = drawn.sample(range(place), min(place, 2))
        pointers = [(symbols[(place + i) % len(symbols)], other) for i, other in enumerate(others)]
        named = " and then ".join(f"a n{other}x" for other in [*others, drawn.randrange(size)])
        lines.append(_synset(place, f"n{place}x", gloss=named, pointers=pointers))
    return {synset.key: synset for synset in wordnet.synsets("\n".join(lines))}


def _judged(row):
    for first, name, second in row["relations"]:
        yield " ".join(row["words"][slice(*first)]), name, " ".join(row["words"][slice(*second)])


def test_relations_are_those_of_wordnet_and_no_pair_is_in_two_splits():
    tree = _tree()
    above = relations.ancestors(tree)
    found, counts, where = relations.examples_of(tree), collections.Counter(), {}
    for split, rows in found.items():
        for row in rows:
            for first, name, second in _judged(row):
                head, tail = (tree["n", int(word[1:-1])] for word in (first, second))
                said = {relations._NAMES[p.symbol] for p in head.pointers if p.key == tail.key}
                back = {relations._NAMES[p.symbol] for p in tail.pointers if p.key == head.key}
                if name == "none":
                    assert not said | back
                elif name == "opposite_of":
                    assert name in said | back
                    assert row["words"].index(first) < row["words"].index(second)
                else:
                    assert name in said or (name == "kind_of" and tail.key in above[head.key])
                if name != "none" or row["kind"] == "pair":
                    pair = frozenset((head.key, tail.key))
                    assert where.setdefault(pair, split) == split
                counts[row["kind"], name] += 1
    assert all(found.values())
    assert len(counts) == 10 and min(counts.values()) > 3


def test_labels_are_of_the_words_that_relations_join():
    for rows in relations.examples_of(_tree()).values():
        for row in rows:
            assert len(row["labels"]) == len(row["words"])
            joined = {tuple(span) for one in row["relations"] for span in one[::2]}
            labelled = {(start, stop) for start, stop, _ in metrics.entities(row["labels"])}
            assert joined <= labelled
            if row["kind"] == "pair":
                assert joined == labelled and len(joined) == 2
                first, name, second = row["relations"][0]
                assert first < second or name not in ("none", "opposite_of")


def test_sentences_do_not_tell_the_relation():
    parts, members = (_tree(symbols=[symbol] * 4) for symbol in ("#p", "#m"))
    found = []
    for tree in (parts, members):
        rows = relations.pair_examples(tree, relations.ancestors(tree))
        found.append({frozenset(row["words"]) for _, row in rows if "none" not in str(row)})
    # Which pairs there are is drawn by their relation, too.
    shared = found[0] & found[1]
    assert len(shared) > 0.7 * len(found[0])


def test_ancestors_are_found_from_any_height_and_in_circles():
    lines = [_synset(i, f"n{i}", pointers=[("@", other)]) for i, other in enumerate([1, 2, 1])]
    tree = {synset.key: synset for synset in wordnet.synsets("\n".join(lines))}
    found = relations.ancestors(tree)
    assert found["n", 0] == {("n", 1), ("n", 2)} and found["n", 1] == {("n", 2)}


def test_words_of_several_meanings_are_judged_where_these_agree():
    lines = [
        _synset(1, "animal"), _synset(2, "limb"), _synset(3, "dog", pointers=[("@", 1)]),
        _synset(4, "paw", "foot", gloss="a foot of an animal or dog, a big limb", pointers=[("#p", 1), ("@", 2)]),
        _synset(5, "limb", "wing"),
        _synset(8, "hand", gloss="a limb", pointers=[("#p", 2), ("@", 5)]),
        _synset(6, "flag", gloss="an animal"), _synset(7, "dog", "run", part="v"),
    ]  # fmt: skip
    tree = {synset.key: synset for synset in wordnet.synsets("\n".join(lines))}
    glosses = relations.Glosses(tree, relations.ancestors(tree))
    _, row = glosses.example(tree["n", 4])
    # A hand is a part of one of its meanings, and a kind of the other.
    assert glosses.example(tree["n", 8]) is None
    # A dog may be a verb, a foot is the paw itself.
    assert list(_judged(row)) == [("paw", "part_of", "animal"), ("paw", "kind_of", "limb")]
    assert glosses.example(tree["n", 6]) is None


def test_a_pair_that_two_glosses_name_is_of_the_lower_ones_split():
    lines = [
        _synset(i, f"n{i}x", gloss=f"a n{i ^ 2}x", pointers=[("@", i - 1)] if i % 4 else [])
        for i in range(400)
    ]
    tree = {synset.key: synset for synset in wordnet.synsets("\n".join(lines))}
    glosses = relations.Glosses(tree, relations.ancestors(tree))
    splits_of_pairs = set()
    for i in range(0, 400, 4):
        (split, upper), (same, lower) = (glosses.example(tree["n", i + k]) for k in (0, 2))
        assert list(_judged(upper)) == list(_judged(lower)) == [(f"n{i + 2}x", "kind_of", f"n{i}x")]
        assert split == same == relations.split_of(("n", i + 2))
        splits_of_pairs.add(split)
    assert len(splits_of_pairs) == 3


def test_what_has_a_relation_is_not_said_to_have_none():
    lines = [
        _synset(i, f"n{i}x", pointers=[("#p", other) for other in range(i)]) for i in range(20)
    ]
    tree = {synset.key: synset for synset in wordnet.synsets("\n".join(lines))}
    rows = relations.pair_examples(tree, relations.ancestors(tree))
    assert len(rows) == 19 * 4 - 6  # four of each whole, fewer of the last ones
    assert all(name == "part_of" for _, row in rows for _, name, _ in _judged(row))


def test_passages_are_of_one_address_each_and_of_its_half_century():
    data = passages.load()
    rows = [row for split in splits.NAMES for row in data.examples[split]]
    assert {row["label"] for row in rows} == {"1800", "1850", "1900", "1950"}
    for row in rows:
        year = int(row["address"][:4])
        assert year <= 1989 and 0 < len(row["text"].encode()) <= 120
        assert int(row["label"]) <= max(year, 1800) < int(row["label"]) + 50
    addresses = [{row["address"] for row in data.examples[split]} for split in splits.NAMES]
    assert sum(map(len, addresses)) == len(set.union(*addresses))
    # A sentence that is too long is cut between words; what is left of it is kept if it is long enough.
    long = "word " * 60 + "end."
    assert " ".join(passages.passages_of(f"Too short. {long}")) == long
