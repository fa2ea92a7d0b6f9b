"""Documents of files and TFDS datasets, what is held out of them, and each bad input's error."""

import builtins
import dataclasses
import gzip
import json
import os
import socket

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import urllib3

from llm_jax import config
from llm_jax import errors
from llm_jax.data import sources

DOCUMENTS = st.lists(st.text(st.sampled_from("ab c\n"), min_size=1), min_size=1, max_size=60)


def _data(source, **changes):
    return config.DataConfig(source=source, **changes)


def _both(data):
    return list(sources.documents(data, "train")), list(sources.documents(data, "validation"))


@hypothesis.given(documents=DOCUMENTS, fraction=st.floats(0.01, 0.9))
def test_hold_out_splits_everything_once(documents, fraction):
    train = list(sources.hold_out(documents, fraction, is_eval=False))
    held = list(sources.hold_out(documents, fraction, is_eval=True))
    if len(documents) < sources.FEW_DOCUMENTS:
        assert sum(map(len, train)) + sum(map(len, held)) == sum(map(len, documents))
        heads, tails = list(train), list(held)
        for document in documents:
            head = heads.pop(0) if heads and document.startswith(heads[0]) else ""
            rest = document[len(head) :]
            assert rest == (tails.pop(0) if rest else "")
        if any(len(document) > 1 for document in documents):
            assert train and held
    else:
        assert sorted(train + held) == sorted(documents)
        assert abs(len(held) - len(documents) * fraction) <= 1
        assert held and train


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3])
def test_held_out_documents_are_spread(fraction):
    held = [int(d) for d in sources.hold_out(map(str, range(1000)), fraction, is_eval=True)]
    gaps = {b - a for a, b in zip(held, held[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1 and abs(len(held) - 1000 * fraction) <= 1


def test_tail_is_cut_at_white_space():
    document = "word " * 200
    (head,) = sources.hold_out([document], 0.1, is_eval=False)
    (tail,) = sources.hold_out([document], 0.1, is_eval=True)
    assert head + tail == document
    assert head.endswith(" ") and tail.startswith("word")
    assert abs(len(tail) / len(document) - 0.1) < 0.02


def test_text_files(tmp_path, monkeypatch):
    for name in ("b/2.txt", "a/1.txt", "a/c/3.txt", "a/skip.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"file {name}\r\né".encode())
    (tmp_path / "a" / "empty.txt").write_text("")
    (tmp_path / "a" / "dir.txt").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for glob in (f"text:{tmp_path}/**/*.txt", "text:~/**/*.txt"):
        train, held = _both(_data(glob))
        joined = [head + tail for head, tail in zip(train, held, strict=True)]
        assert joined == [f"file {n}\r\né" for n in ("a/1.txt", "a/c/3.txt", "b/2.txt")]


def test_jsonl_files(tmp_path):
    lines = [json.dumps({"body": f"document {i}", "n": i}) for i in range(20)]
    (tmp_path / "1.jsonl").write_text("\n".join(lines[:10]) + "\n\n")
    with gzip.open(tmp_path / "2.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[10:]))
    train, held = _both(_data(f"jsonl:{tmp_path}/*.jsonl*:body", eval_fraction=0.2))
    assert sorted(train + held) == sorted(f"document {i}" for i in range(20))
    assert held == ["document 0", "document 5", "document 10", "document 15"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"text": 3}', r"x.jsonl:2: field 'text' is a int"),
        (b'{"txt": "a"}', r"x.jsonl:2 has no field 'text': its fields are txt \(did you mean"),
        (b"[]", r"x.jsonl:2 is a list"),
        (b"{", r"x.jsonl:2 is not JSON.*'text'"),
        (b'{"text": "\xff"}', r"x.jsonl:2 is not UTF-8"),
    ],
)
def test_bad_jsonl_lines(tmp_path, line, named):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(errors.UserError, match=named):
        list(sources.documents(_data(f"jsonl:{tmp_path}/x.jsonl:text"), "train"))


def test_bad_files(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"ab\xffc")
    (tmp_path / "empty.md").write_bytes(b"")
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}')[:-9])
    (tmp_path / "not.jsonl.gz").write_bytes(b'{"text": "a"}')
    for source, named in (
        (f"text:{tmp_path}/bad.txt", "bad.txt is not UTF-8: byte 2 is 0xff"),
        (f"text:{tmp_path}/*.none", "matches no file"),
        (f"text:{tmp_path}", "matches only directories"),
        (f"text:{tmp_path}/*.md", "are empty"),
        (f"jsonl:{tmp_path}/empty.jsonl:text", "are empty"),
        (f"jsonl:{tmp_path}/cut.jsonl.gz:text", "cannot read .*cut.jsonl.gz"),
        (f"jsonl:{tmp_path}/not.jsonl.gz:text", "cannot read .*not.jsonl.gz"),
        ("jsonl:x.jsonl", "jsonl:GLOB:field"),
        ("tfd:x", "did you mean 'tfds'"),
    ):
        with pytest.raises(errors.UserError, match=named):
            list(sources.documents(_data(source), "train"))


def test_splits_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("a b")
    data = _data(f"text:{tmp_path}/a.txt")
    with pytest.raises(errors.UserError, match="no split 'test': its splits are 'train' and 'vali"):
        list(sources.documents(data, "test"))
    with pytest.raises(errors.UserError, match="both 'train'"):
        list(sources.documents(dataclasses.replace(data, eval_split="train"), "train"))


def test_identity_follows_the_files(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("a b")
    os.utime(file, ns=(0, 10))
    data = _data(f"text:{tmp_path}/*.txt")

    def identity(split="train", **changes):
        return sources.identity(dataclasses.replace(data, **changes), split)

    seen = [identity(), identity("validation"), identity(eval_fraction=0.1)]
    os.utime(file, ns=(0, 20))
    seen.append(identity())
    (tmp_path / "b.txt").write_text("")
    seen.append(identity())
    assert len(set(seen)) == len(seen)
    assert identity() == seen[-1]
    assert identity(batch_size=3) == seen[-1]


@pytest.fixture(scope="module")
def no_network():
    """Any connection fails at once, and is noted."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        # TFDS's downloads try ten times, two minutes in all.
        patch.setattr(urllib3.util.retry.Retry, "sleep", lambda self, response=None: None)
        yield attempts


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def _sotu(cache_dir, **changes):
    return _data("tfds:state_of_the_union", cache_dir=cache_dir, **changes)


def test_embedded_corpus_builds_without_network(no_network, cache_dir):
    counts, characters = {}, 0
    for split in ("train", "validation", "test"):
        documents = list(sources.documents(_sotu(cache_dir), split))
        counts[split] = len(documents)
        characters += sum(map(len, documents))
        assert documents == list(sources.documents(_sotu(cache_dir), split))
        assert all(documents)
    assert counts == {"train": 201, "validation": 15, "test": 17}
    assert 10_000_000 < characters < 11_000_000
    assert no_network == []


def test_embedded_corpus_features(cache_dir):
    from llm_jax.data import tfds_source

    builder = tfds_source.prepared("state_of_the_union", cache_dir)
    assert builder.info.file_format.value == "tfrecord"
    for split, first, last in (
        ("train", 1790, 1989),
        ("validation", 1990, 2004),
        ("test", 2005, 2021),
    ):
        examples = list(builder.as_dataset(split=split).as_numpy_iterator())
        years = [int(example["year"]) for example in examples]
        assert (min(years), max(years)) == (first, last)
        assert set(examples[0]) == {"text", "year", "name", "party"}
    first = next(sources.documents(_sotu(cache_dir), "train"))
    assert first.startswith("Fellow-Citizens of the Senate and House of Representatives")


def test_slices_of_splits(cache_dir):
    assert len(list(sources.documents(_sotu(cache_dir), "train[:5]+test"))) == 22


@pytest.mark.parametrize(
    ("source", "split", "named"),
    [
        (
            "tfds:state_of_the_union",
            "validatoin",
            "no split 'validatoin': its splits are .*did you mean",
        ),
        ("tfds:state_of_the_union", "train[:x]", r"split 'train\[:x\]'"),
        ("tfds:state_of_the_onion", "train", "did you mean 'state_of_the_union'"),
        ("tfds:state_of_the_union/big", "train", "state_of_the_union/big"),
        ("tfds:ag_news_subset", "train", "is not prepared in .*preparing it failed"),
    ],
)
def test_tfds_errors(no_network, cache_dir, source, split, named):
    with pytest.raises(errors.UserError, match=named) as caught:
        list(sources.documents(_data(source, cache_dir=cache_dir), split))
    assert "\n" not in str(caught.value)


def test_text_feature(tmp_path):
    """The only string feature will do; two without a `text` are an error that lists them."""
    from llm_jax.data import tfds_source

    tfds = tfds_source.tfds
    for features, expected in (
        ({"text": tfds.features.Text(), "title": tfds.features.Text()}, "text"),
        ({"body": tfds.features.Text(), "n": tfds.features.Scalar(dtype=np.int64)}, "body"),
        ({"q": tfds.features.Text(), "a": tfds.features.Text()}, None),
        ({"n": tfds.features.ClassLabel(num_classes=2)}, None),
    ):
        builder = tfds.testing.DummyDataset(data_dir=str(tmp_path))
        builder.info._features = tfds.features.FeaturesDict(features)
        if expected:
            assert tfds_source.text_feature(builder) == expected
        else:
            with pytest.raises(errors.UserError, match="features: .*" + next(iter(features))):
                tfds_source.text_feature(builder)


def test_files_need_no_tensorflow(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a b")
    real = builtins.__import__

    def guarded(name, *args, **kwargs):
        assert not name.startswith("tensorflow"), "TensorFlow takes seconds to import"
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert list(sources.documents(_data(f"text:{tmp_path}/a.txt"), "train")) == ["a "]


def test_a_source_of_evaluation_is_read_whole_and_leaves_the_other_whole(tmp_path):
    for name, count in (("train", 30), ("test", 7)):
        lines = (json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    data = config.DataConfig(
        source=f"jsonl:{tmp_path}/train.jsonl:text", eval_source=f"jsonl:{tmp_path}/test.jsonl:text"
    )
    found = {split: list(sources.documents(data, split)) for split in ("train", "validation")}
    assert found["train"] == [f"train {i}" for i in range(30)]
    assert found["validation"] == [f"test {i}" for i in range(7)]
    examples = dataclasses.replace(
        data, source=data.source.removesuffix(":text"), eval_source=data.eval_source[:-5]
    )
    rows = [row["text"] for _, row in sources.records(examples, "validation", ["text"])]
    assert rows == found["validation"]
    # What was tokenised as one split serves as the other.
    alone = dataclasses.replace(data, source=data.eval_source)
    assert sources.identity(data, "validation") == sources.identity(alone, "train")
    held_out = dataclasses.replace(data, eval_source="")
    assert sources.identity(held_out, "train") != sources.identity(data, "train")
