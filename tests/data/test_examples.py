"""Examples: records to columns, labels and answers; and the cache that keeps them."""

import dataclasses
import gzip
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.data import cache_folder
from llm_jax.data import example_cache
from llm_jax.data import examples
from llm_jax.data import prepare
from llm_jax.data import preprocessing
from llm_jax.data import sources

ROOT = pathlib.Path(__file__).parents[2]

SENTIMENT = [
    {"text": f"number {i} is {'fine' if i % 3 else 'bad'} ü", "label": "good" if i % 3 else "bad"}
    for i in range(40)
]


@pytest.fixture
def run(tmp_path):
    """Returns a function that writes records and gives the config of an objective on them."""

    def make(records, objective, fields="text", target="label", **changes):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        is_label = objective in ("sequence", "token", "span")
        model = {"architecture": "encoder" if is_label else "encoder_decoder", "vocab_size": 512}
        data = {"source": f"jsonl:{tmp_path}/*.jsonl", "cache_dir": str(tmp_path / "cache")}
        data |= {"input_fields": fields, "target_field": target, "eval_fraction": 0.2}
        model |= {"head": objective if is_label else "lm"}
        for name, value in changes.items():
            (model if hasattr(config_lib.ModelConfig(), name) else data)[name] = value
        config = config_lib.RunConfig(
            model=config_lib.ModelConfig(**model),
            data=config_lib.DataConfig(**data),
            objective=config_lib.ObjectiveConfig(name=objective),
        )
        config_lib.check(config)
        return config

    return make


def _text(column, index):
    return bytes(column[index].tolist()).decode()


def test_every_record_is_in_one_split(run):
    prepared = prepare.prepare(run(SENTIMENT, "sequence"))
    seen = []
    for cache in (prepared.train, prepared.eval):
        for i in range(cache.num_examples):
            label = cache.manifest.labels[int(cache.target[i][0])]
            seen.append({"text": _text(cache.inputs[0], i), "label": label})
    assert sorted(seen, key=str) == sorted(SENTIMENT, key=str)
    assert prepared.eval.num_examples == 8
    assert prepared.labels == ["bad", "good"] == prepared.eval.manifest.labels
    assert prepared.tokenizer.cls_id == 256


def test_texts_that_get_a_label_are_preprocessed_and_kept_apart(run):
    plain = prepare.prepare(run(SENTIMENT, "sequence")).train
    config = run(SENTIMENT, "sequence", preprocessing="normalise, stem")
    stemmed = prepare.prepare(config).train
    assert stemmed.path != plain.path and stemmed.num_examples == plain.num_examples
    change = preprocessing.make(["normalise", "stem"])
    for i in range(plain.num_examples):
        assert _text(stemmed.inputs[0], i) == change(_text(plain.inputs[0], i))
    for preprocessed, objective, said in (
        ("stemm", "sequence", "did you mean 'stem'"),
        ("stem", "seq2seq", "are for objective.name = 'sequence'"),
    ):
        with pytest.raises(errors.UserError, match=said):
            prepare.prepare(run(SENTIMENT, objective, preprocessing=preprocessed))


def test_two_texts_and_a_text_to_write(run):
    records = [{"a": f"{i}", "b": "x" * i, "c": "ü" * i} for i in range(20)]
    cache = prepare.prepare(run(records, "seq2seq", "a, b", "c")).train
    kept = [r for i, r in enumerate(records) if not sources._is_held_out(i, 0.2)]
    for i, record in enumerate(kept):
        columns = [*cache.inputs, cache.target]
        assert [_text(column, i) for column in columns] == list(record.values())
    assert cache.target.lengths.tolist() == [2 * len(r["c"]) for r in kept]
    assert cache.manifest.labels is None


@pytest.mark.parametrize(
    "values, names",
    [(["b", "a"], ["a", "b"]), ([2, 0], ["0", "1", "2"]), ([True, False], ["0", "1"])],
)
def test_labels_are_named(run, values, names):
    records = [{"text": "x", "label": values[i % 2]} for i in range(20)]
    prepared = prepare.prepare(run(records, "sequence", num_labels=3))
    assert prepared.labels == names
    found = {int(prepared.train.target[i][0]) for i in range(prepared.train.num_examples)}
    assert {names[i] for i in found} == {str(int(v)) if names[0] == "0" else v for v in values}


def test_regression_takes_numbers(run):
    records = [{"text": "x", "label": i / 4} for i in range(20)]
    prepared = prepare.prepare(run(records, "sequence", num_labels=1))
    assert prepared.labels is None and prepared.train.target.values.dtype == np.float32
    both = [*prepared.train.target.values, *prepared.eval.target.values]
    assert sorted(both) == [i / 4 for i in range(20)]


def test_words_have_labels_at_their_first_tokens(run):
    records = [{"w": ["Äh", "New", "York", "."], "t": ["O", "B", "I", "O"]}] * 20
    prepared = prepare.prepare(run(records, "token", "w", "t", num_labels=3))
    assert prepared.labels == ["B", "I", "O"]
    tokens, labels = prepared.train.inputs[0][0], prepared.train.target[0]
    assert bytes(tokens.tolist()).decode() == "Äh New York ."
    assert len(tokens) == len(labels)
    assert {int(i): int(labels[i]) for i in np.flatnonzero(labels >= 0)} == {
        0: 2,
        4: 0,
        8: 1,
        13: 2,
    }


def test_words_of_tokens_that_begin_with_a_space(run):
    records = [{"w": ["it", "its", "it", "it"], "t": [0, 1, 0, 1]}] * 40
    config = run(records, "token", "w", "t", tokenizer="train_bpe:262")
    prepared = prepare.prepare(config)
    tokens, labels = prepared.train.inputs[0][0], prepared.train.target[0]
    assert any(prepared.tokenizer.decode([t]).startswith(" i") for t in tokens)
    starts = np.flatnonzero(labels >= 0)
    ends = [*starts[1:], len(tokens)]
    words = [prepared.tokenizer.decode(tokens[a:b]).strip() for a, b in zip(starts, ends)]
    assert words == records[0]["w"] and labels[starts].tolist() == records[0]["t"]


SQUAD = {
    "q": "Who?",
    "c": "It was naïve 🦙 Ada, they say.",
    "a": {"text": ["Ada", "they"], "answer_start": [15, 20]},
}


@pytest.mark.parametrize(
    "answer, expected",
    [
        (SQUAD["a"], "Ada"),
        ({"text": "🦙", "answer_start": 13}, "🦙"),
        ({"text": [], "answer_start": []}, None),
        (None, None),
    ],
)
def test_answers_are_spans_of_tokens(run, answer, expected):
    config = run([SQUAD | {"a": answer}] * 20, "span", "q,c", "a")
    cache = prepare.prepare(config).train
    first, last = cache.target[0].tolist()
    if expected is None:
        assert (first, last) == (-1, -1)
    else:
        assert bytes(cache.inputs[1][0][first : last + 1].tolist()).decode() == expected
    assert _text(cache.inputs[0], 0) == "Who?"


@pytest.mark.parametrize(
    "record, objective, fields, target, changes, message",
    [
        ({"text": 3, "label": 0}, "sequence", "text", "label", {}, "'text' is a int, not a string"),
        (
            {"text": "x"},
            "sequence",
            "text",
            "label",
            {},
            "has no field 'label': its fields are text",
        ),
        ({"txt": "x", "label": 1}, "sequence", "text", "label", {}, "did you mean 'txt'"),
        ({"text": "x", "label": [1]}, "sequence", "text", "label", {}, "= \\[1\\] is no label"),
        ({"text": "x", "label": 1.5}, "sequence", "text", "label", {}, "= 1.5 is no label"),
        ({"text": "x", "label": -1}, "sequence", "text", "label", {}, "labels are strings, or num"),
        (
            {"text": "x", "label": 7},
            "sequence",
            "text",
            "label",
            {},
            "8 labels, more than model.num_l",
        ),
        (
            {"text": "x", "label": "y"},
            "sequence",
            "text",
            "label",
            {"num_labels": 1},
            "'y' is no number",
        ),
        ({"w": "x", "t": [0]}, "token", "w", "t", {}, "words' is a str, not a list"),
        ({"w": ["x"], "t": [0, 1]}, "token", "w", "t", {}, "1 words and 2 labels"),
        ({"text": "a\0", "label": 0}, "sequence", "text", "label", {}, "NUL"),
        (SQUAD | {"a": "Ada"}, "span", "q,c", "a", {}, "is an object with text and answer_start"),
        (
            SQUAD | {"a": {"text": "Ada", "answer_start": 14}},
            "span",
            "q,c",
            "a",
            {},
            "'Ada' is not at character 14 of the context, where ' Ad' is",
        ),
    ],
)
def test_bad_examples_are_named(run, record, objective, fields, target, changes, message):
    good = {"text": "x", "label": 0, "w": ["x"], "t": [0]} | SQUAD
    config = run([good, good, record], objective, fields, target, **changes)
    with pytest.raises(errors.UserError, match=message) as error:
        prepare.prepare(config)
    if "num_labels" not in message and "labels are" not in message and "more than" not in message:
        assert "data.jsonl:3" in str(error.value)


def test_a_label_that_training_never_saw(run):
    records = [{"text": "x", "label": "odd" if i == 0 else "even"} for i in range(20)]
    with pytest.raises(errors.UserError, match="jsonl:1: 'odd' is none of the 1 labels"):
        prepare.prepare(run(records, "sequence"))


def test_zipped_records(run, tmp_path):
    config = run(SENTIMENT, "sequence")
    whole = prepare.prepare(config)
    (tmp_path / "data.jsonl").unlink()
    with gzip.open(tmp_path / "data.jsonl.gz", "wb") as file:
        file.write("".join(json.dumps(r) + "\n" for r in SENTIMENT).encode())
    data = dataclasses.replace(config.data, source=f"jsonl:{tmp_path}/*.gz")
    zipped = prepare.prepare(dataclasses.replace(config, data=data))
    assert zipped.train.path != whole.train.path
    assert zipped.train.manifest.sha256 == whole.train.manifest.sha256


# --- the cache --------------------------------------------------------------------------------


def test_finished_caches_are_reused_and_changes_make_new_ones(run, monkeypatch):
    config = run(SENTIMENT, "sequence")
    first = prepare.prepare(config)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "records", None)
        data = dataclasses.replace(config.data, batch_size=2, sequence_length=99, packing="none")
        again = prepare.prepare(dataclasses.replace(config, data=data))
    assert again.train.path == first.train.path and again.eval.path == first.eval.path
    changed = [dict(r, label="neutral") if i == 7 else r for i, r in enumerate(SENTIMENT)]
    others = [
        prepare.prepare(run(SENTIMENT, "sequence", tokenizer="train_bpe:300")),
        prepare.prepare(run(SENTIMENT, "seq2seq")),
        prepare.prepare(run(SENTIMENT, "sequence", "text,label")),
        prepare.prepare(run(changed, "sequence", num_labels=3)),
    ]
    assert len({p.train.path for p in [first, *others]}) == 5
    # The new label is in the training split; evaluation is numbered by it, too.
    assert others[-1].eval.manifest.labels == ["bad", "good", "neutral"]
    assert others[-1].eval.path != first.eval.path


@pytest.mark.parametrize("name", ["input_0.bin", "target.bin", "input_0.offsets.bin"])
def test_damage_is_told(run, name):
    config = run(SENTIMENT, "sequence")
    cache = prepare.prepare(config).train
    example_cache.ExampleCache.open(cache.path, verify=True)
    file = cache.path / name
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    with pytest.raises(errors.UserError, match=f"{name}: its checksum"):
        example_cache.ExampleCache.open(cache.path, verify=True)
    file.write_bytes(content[:-1])
    with pytest.raises(errors.UserError, match=f"{name}: it has .* bytes where"):
        prepare.prepare(config)
    (cache.path / cache_folder.MANIFEST_FILE).unlink()
    with pytest.raises(errors.UserError, match="not a finished example cache"):
        prepare.prepare(config)


def test_what_fails_leaves_no_cache(run):
    config = run([*SENTIMENT[:7], {"text": "x"}, *SENTIMENT], "seq2seq")
    with pytest.raises(errors.UserError, match="data.jsonl:8 has no field 'label'"):
        prepare.prepare(config)
    folder = pathlib.Path(config.data.cache_dir) / "examples"
    assert not [path for path in folder.iterdir() if path.is_dir()]
    with pytest.raises(errors.UserError, match="has no examples"):
        prepare.prepare(run(SENTIMENT[:1], "sequence"))


def test_the_command(run, tmp_path):
    config = run(SENTIMENT, "sequence")
    file = tmp_path / "c.py"
    file.write_text("from llm_jax import config\ndef get_config():\n    return config.new()\n")
    flags = [f"--config={file}", f"--config.data.source={config.data.source}"]
    flags += [f"--config.data.cache_dir={config.data.cache_dir}", "--config.model.vocab_size=300"]
    flags += ["--config.model.architecture=encoder", "--config.model.head=sequence"]
    flags += ["--config.objective.name=sequence"]
    command = [sys.executable, "-m", "llm_jax.prepare", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train: 38 examples" in done.stdout and "labels bad, good, in" in done.stdout


# --- TFDS -------------------------------------------------------------------------------------


def test_examples_of_tfds(tmp_path_factory):
    data = config_lib.DataConfig(
        source="tfds:state_of_the_union",
        cache_dir=str(tmp_path_factory.mktemp("tfds")),
        input_fields="name",
        target_field="party",
    )
    config = config_lib.RunConfig(
        model=config_lib.ModelConfig(
            architecture="encoder", head="sequence", num_labels=9, vocab_size=512
        ),
        data=data,
        objective=config_lib.ObjectiveConfig(name="sequence"),
    )
    prepared = prepare.prepare(config)
    assert {"Democratic", "Republican"} < set(prepared.labels)
    names = [_text(prepared.eval.inputs[0], i) for i in range(prepared.eval.num_examples)]
    parties = [prepared.labels[i] for i in prepared.eval.target.values]
    assert ("William J Clinton", "Democratic") in set(zip(names, parties, strict=True)), names
    # Labels are those of the training split, so evaluation follows from it, too.
    less = dataclasses.replace(data, train_split="train[50%:]")
    other = prepare.prepare(dataclasses.replace(config, data=less))
    assert other.labels != prepared.labels and other.eval.path != prepared.eval.path
    wrong = dataclasses.replace(config, data=dataclasses.replace(data, target_field="partie"))
    with pytest.raises(errors.UserError, match="no feature 'partie'.*did you mean 'party'"):
        prepare.prepare(wrong)


def test_classes_and_nested_features_of_tfds(tmp_path, monkeypatch):
    from llm_jax.data import tfds_source

    tfds = tfds_source.tfds
    builder = tfds.testing.DummyDataset(data_dir=str(tmp_path))
    classes = tfds.features.ClassLabel(names=["no", "yes"])
    builder.info._features = tfds.features.FeaturesDict(
        {"label": classes, "tags": tfds.features.Sequence(classes), "n": np.int64}
    )
    monkeypatch.setattr(tfds_source, "prepared", lambda name, cache_dir: builder)
    assert tfds_source.label_names("x", "", "label") == ["no", "yes"]
    assert tfds_source.label_names("x", "", "tags") == ["no", "yes"]
    assert tfds_source.label_names("x", "", "n") is None
    nested = {"text": np.array([b"\xc3\xbc"], object), "answer_start": np.array([3], np.int32)}
    assert tfds_source._as_json(nested) == {"text": ["ü"], "answer_start": [3]}
    assert examples._first_answer(tfds_source._as_json(nested), "x") == ("ü", 3)
