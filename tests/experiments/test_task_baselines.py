"""Baselines score what they say they do, on data whose answers are known."""

import json

import pytest

from experiments.tasks import baselines
from experiments.tasks.data import definitions
from llm_jax import errors


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "FOLDER", tmp_path)

    def write_split(name, split, rows):
        (tmp_path / name).mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / f"{split}.jsonl").write_text(text)

    return write_split


def _value(name, key, stages=()):
    return baselines.score(name, stages)[0]["scores"][key]["value"]


def test_the_most_frequent_relation_is_that_of_training(write):
    def rows(names):
        return [{"words": ["a", "b"], "relations": [[[0, 1], n, [1, 2]] for n in names]}]

    write("relations", "train", rows(["kind_of", "kind_of", "none"]))
    write("relations", "test", rows(["none", "none", "kind_of", "part_of"]))
    assert _value("relations", "accuracy") == 0.25


def test_spans_are_found_by_their_term(write):
    rows = [
        {"question": f"What is {w}?", "term": w, "answer": f"gloss {w} {w}"} for w in "abcdefghij"
    ]
    write("spans", "test", definitions.spans_of(rows, "seed"))
    assert _value("spans", "rule/exact_match") == 1.0
    firsts = [row["context"].startswith(row["term"]) for row in definitions.spans_of(rows, "seed")]
    assert _value("spans", "exact_match") == sum(firsts) / len(firsts) < 1.0


def test_descriptions_are_found_by_their_words(write):
    rows = [{"query": f"word{i}", "document": f"some text of word{i}"} for i in range(12)]
    write("descriptions", "test", rows)
    assert _value("descriptions", "recall@1") == 1.0
    write("descriptions", "test", [row | {"query": "nothing"} for row in rows])
    assert _value("descriptions", "recall@1") < 0.2


def test_stages_are_of_what_is_counted(write):
    train = [("goods", "a"), ("bads", "b")] * 3
    test = [("GOOD", "a"), ("Bad", "b"), ("Good", "a"), ("bad", "b"), ("bad", "b")]
    for split, rows in {"train": train, "validation": [], "test": test}.items():
        write("spam", split, [{"text": text, "label": label} for text, label in rows])
    assert _value("spam", "accuracy", ["normalise", "stem"]) == 1.0
    assert _value("spam", "accuracy") < 1.0


def test_a_lexicon_sums_what_its_words_are_rated(write, monkeypatch):
    ratings = {"good": 2.0, "fun": 1.0, "bad": -2.5}
    monkeypatch.setattr(baselines.sentiment_data, "lexicon", lambda: ratings)
    rows = [("Good fun!", "positive"), ("good, bad", "negative"), ("a fun film", "positive")]
    rows = [{"text": text, "label": label} for text, label in [*rows, ("a film", "positive")]]
    for split in ("train", "validation", "test"):
        write("sentiment", split, rows)
    assert _value("sentiment", "lexicon/accuracy") == 0.75  # nothing is known of the last


def test_what_is_kept_has_no_texts(write):
    write("summaries", "test", [{"long": "A secret text. And more.", "short": "the secret"}] * 3)
    kept, found = baselines.score("summaries", [])
    assert found.examples[0] == ("A secret text. And more.", "the secret", "A secret text.")
    assert "secret" not in json.dumps(kept)


def test_what_is_not_there_is_named(write):
    with pytest.raises(errors.UserError, match="did you mean 'spam'"):
        baselines.score("spamm", [])
    with pytest.raises(
        errors.UserError, match="run python -m experiments.tasks.data translation:it"
    ):
        baselines.score("translation_it", [])


def test_a_memory_says_the_translation_of_the_nearest_source(write):
    pairs = [("a red apple", "una mela rossa"), ("three old houses", "tre vecchie case")]
    rows = [{"source": source, "target": target} for source, target in pairs]
    write("translation_it", "train", rows)
    write("translation_it", "test", [{"source": "the red apples", "target": "una mela rossa"}])
    assert _value("translation_it", "memory/exact_match") == 1.0
    assert _value("translation_it", "exact_match") == 0.0
