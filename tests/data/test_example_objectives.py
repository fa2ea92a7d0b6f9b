"""Objectives of examples: rows as defined, packing that loses nothing, truncation that is told."""

import dataclasses
import itertools
import logging

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.aot import steps
from llm_jax.config import schema
from llm_jax.data import example_cache
from llm_jax.data import objectives
from llm_jax.data import pipeline
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data.objectives import examples as examples_lib
from llm_jax.data.objectives import plan
from tests import helpers
from tests.data import streams

EOS, CLS = 0, 256  # of the bytes tokenizer; its eos is its sep and its pad


def _column(rows, dtype=np.int32):
    return example_cache.Column(
        np.concatenate([*rows, []]).astype(dtype),
        np.cumsum([0, *map(len, rows)]).astype(np.uint64),
    )


def _cache(inputs, targets, dtype=np.int32):
    """A cache of columns of lists."""
    columns = {f"input_{i}": _column(column) for i, column in enumerate(inputs)}
    manifest = example_cache.Manifest(
        **dict.fromkeys(field.name for field in dataclasses.fields(example_cache.Manifest))
    )
    counts = {"num_examples": len(targets), "eos_id": EOS, "pad_id": EOS}
    manifest = dataclasses.replace(manifest, source="test", split="train", **counts)
    columns["target"] = _column(targets, dtype)
    return example_cache.ExampleCache(None, manifest, columns)


def _stage(cache, objective, architecture, *, length=32, target_length=16, **changes):
    model = {"architecture": architecture, "vocab_size": 512}
    heads = {"seq2seq": "lm", "contrastive": "none"} | dict.fromkeys(schema.CHAT_OBJECTIVES, "lm")
    head = heads[objective] if objective in heads else objective
    model |= {"head": head, "decoder_start_id": 7}
    num_fields = 1 if objective in schema.CHAT_OBJECTIVES else len(cache.inputs)
    data = {"sequence_length": length, "input_fields": ",".join("ab"[:num_fields])}
    data |= {"target_field": "a,b"} if objective == "preference" else {}
    settings = {"name": objective, "target_length": target_length}
    for name, value in changes.items():
        for section, kind in (
            (model, config_lib.ModelConfig),
            (data, config_lib.DataConfig),
            (settings, config_lib.ObjectiveConfig),
        ):
            if hasattr(kind(), name):
                section[name] = value
    config = config_lib.RunConfig(
        model=config_lib.ModelConfig(**model),
        data=config_lib.DataConfig(**data),
        objective=config_lib.ObjectiveConfig(**settings),
        tune=config_lib.TuneConfig(start="somewhere"),
    )
    config_lib.check(config)
    config_lib.check_objective(config)
    tokenizer = objectives.extended(config, tokenizer_lib.load("bytes").extended(["<cls>"]))
    return objectives.make(config, cache, tokenizer)


def _batch(stage, items=None):
    items = np.arange(stage.num_items) if items is None else np.asarray(items)
    return stage(items, items, objectives.Draws(0))


def _random(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 256, n).tolist() for n in lengths]


def _parts(tokens, segments):
    return {
        (row, int(s)): tokens[row][segments[row] == s].tolist()
        for row in range(len(tokens))
        for s in np.unique(segments[row])
        if s > 0
    }


SIZES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=40
)


# --- truncation -------------------------------------------------------------------------------


@hypothesis.given(first=st.integers(0, 50), second=st.integers(0, 50), room=st.integers(0, 60))
def test_the_longer_text_is_cut(first, second, room):
    kept = examples_lib.fit(np.array([first]), np.array([second]), room)
    a, b = first, second
    while a + b > room:  # BERT's definition; of equal ones it may be either
        a, b = (a - 1, b) if a > b else (a, b - 1)
    assert sum(kept)[0] == a + b and abs(kept[0][0] - a) <= 1
    assert kept[0][0] <= first and kept[1][0] <= second


def test_long_examples_are_counted_and_refused(caplog):
    # Of 32 tokens one is eos: 31 fit. Of 16 targets 15.
    cache = _cache([_random([5, 40, 20, 31])], _random([3, 3, 30, 15]))
    with caplog.at_level(logging.WARNING):
        stage = _stage(cache, "seq2seq", "encoder_decoder")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("2 of the 4 examples in split 'train' of test are longer than data.seq")
    batch = _batch(stage)
    assert batch.weights.sum() == 3 + 3 + 15 + 15 + 4 and batch.encoder_tokens.shape[1] == 32
    with pytest.raises(errors.UserError, match="2 of the 4 .* first of them is number 2: raise"):
        _stage(cache, "seq2seq", "encoder_decoder", too_long="refuse")
    caplog.clear()
    _stage(cache, "seq2seq", "encoder_decoder", length=41, target_length=31, too_long="refuse")
    assert not caplog.records
    with pytest.raises(errors.UserError, match="sequence_length = 1 has no room for text beside 1"):
        _stage(cache, "seq2seq", "encoder_decoder", length=1)


# --- packing ----------------------------------------------------------------------------------


@hypothesis.given(lengths=st.lists(st.tuples(st.integers(1, 10), st.integers(1, 6)), max_size=60))
def test_first_fit(lengths):
    array = np.array(lengths, np.int64).reshape(-1, 2)
    rows = plan.first_fit(array, (10, 6))
    num_rows = int(rows.max(initial=-1)) + 1
    assert set(rows.tolist()) == set(range(num_rows)), "no row is empty"
    assert np.all(np.diff([np.flatnonzero(rows == r)[0] for r in range(num_rows)]) > 0)
    for i, row in enumerate(rows):
        before = array[:i]
        for other in range(num_rows):
            used = before[rows[:i] == other].sum(axis=0)
            fits = np.all(used + array[i] <= (10, 6))
            if other == row:
                assert fits
            elif other < row and num_rows <= 32:
                assert not fits, "an earlier row had room"


def test_packing_fills_rows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, (2000, 1))
    rows = plan.first_fit(lengths, (64,))
    assert lengths.sum() / (64 * (rows.max() + 1)) > 0.9  # one a row: 0.48


@pytest.mark.parametrize("packing", ["packed", "none"])
@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder"])
@hypothesis.given(sizes=SIZES, is_pair=st.booleans())
@hypothesis.settings(max_examples=25)
def test_seq2seq_rows(sizes, is_pair, architecture, packing):
    first, second, targets = (
        _random(column, i) for i, column in enumerate(zip(*sizes, strict=True))
    )
    inputs = [first, second] if is_pair else [first]
    cache = _cache(inputs, targets)
    stage = _stage(cache, "seq2seq", architecture, length=128, target_length=32, packing=packing)
    batch = _batch(stage)
    expected = sorted(
        (sum(([*text, EOS] for text in texts), []), [*target, EOS])
        for *texts, target in zip(*inputs, targets, strict=True)
    )
    if architecture == "encoder_decoder":
        given = _parts(batch.encoder_tokens, batch.encoder_segments)
        written = _parts(batch.targets, batch.segments)
        read = _parts(batch.tokens, batch.segments)
        assert given.keys() == written.keys(), "parts share their numbers"
        assert all(read[key] == [7, *written[key][:-1]] for key in read)
        np.testing.assert_array_equal(batch.weights, batch.segments > 0)
        found = [(given[key], written[key]) for key in given]
    else:
        found = []
        for (row, number), tokens in _parts(batch.tokens, batch.segments).items():
            is_mine = batch.segments[row] == number
            weights = batch.weights[row][is_mine]
            start = int(np.argmax(weights)) + 1
            assert weights.tolist() == [0] * (start - 1) + [1] * (len(tokens) - start) + [0]
            assert batch.targets[row][is_mine][weights > 0].tolist() == tokens[start:]
            found.append((tokens[:start], tokens[start:]))
    assert sorted(found) == expected, "every example is in one row"
    if packing == "none":
        assert len(found) == stage.num_items
    for row, number in _parts(batch.tokens, batch.segments):
        places = batch.positions[row][batch.segments[row] == number]
        np.testing.assert_array_equal(places, range(len(places)))
    assert np.all(batch.tokens[batch.segments == 0] == EOS)


def test_seq2seq_of_a_decoder_keeps_both_sides():
    cache = _cache([_random([100, 4, 100])], _random([4, 100, 100]))
    stage = _stage(cache, "seq2seq", "decoder", length=32, packing="none")
    batch = _batch(stage)
    # 32 less two eos.
    assert batch.weights.sum(axis=1).tolist() == [4 + 1, 26 + 1, 15 + 1]
    assert (batch.segments > 0).all()


# --- labels -----------------------------------------------------------------------------------


def test_pairs_of_an_encoder():
    cache = _cache([[[1, 2], [5] * 40], [[3, 4, 9], [6] * 20]], [[1], [0]])
    batch = _batch(_stage(cache, "sequence", "encoder", num_token_types=2), [0, 1, -1])
    assert batch.tokens[0][:9].tolist() == [CLS, 1, 2, EOS, 3, 4, 9, EOS, EOS]
    assert batch.token_types[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1] + [0] * 24
    assert batch.segments[0].tolist() == [1] * 8 + [0] * 24
    assert batch.positions[0].tolist() == [*range(8), *[0] * 24]
    # 32 less three: the first is cut to 15, the second to 14.
    assert batch.tokens[1].tolist() == [CLS, *[5] * 15, EOS, *[6] * 14, EOS]
    assert batch.token_types[1].tolist() == [0] * 17 + [1] * 15
    assert batch.targets.tolist() == [1, 0, 0] and batch.targets.dtype == np.int32
    assert batch.weights.tolist() == [1.0, 1.0, 0.0]
    assert not batch.segments[2].any() and not batch.token_types[2].any()
    assert _batch(_stage(cache, "sequence", "encoder")).token_types is None
    decoded = _batch(_stage(cache, "sequence", "decoder"))
    assert decoded.tokens[0][:8].tolist() == [1, 2, EOS, 3, 4, 9, EOS, EOS]


def test_regression_targets_are_float32():
    cache = _cache([[[1], [2]]], [[0.25], [-1.5]], np.float32)
    batch = _batch(_stage(cache, "sequence", "encoder", num_labels=1), [1, 0])
    assert batch.targets.dtype == np.float32 and batch.targets.tolist() == [-1.5, 0.25]


@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
@pytest.mark.parametrize("packing", ["packed", "none"])
@hypothesis.given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=30))
@hypothesis.settings(max_examples=25)
def test_token_labels(sizes, packing, architecture):
    texts = _random(sizes)
    rng = np.random.default_rng(1)
    labels = [rng.integers(-1, 4, n).tolist() for n in sizes]
    stage = _stage(_cache([texts], labels), "token", architecture, packing=packing, num_labels=4)
    batch = _batch(stage)
    first = [CLS] if architecture == "encoder" else []
    room = 32 - len(first) - 1
    expected = sorted(
        ([*first, *text[:room], EOS], [*[-1] * len(first), *mine[:room], -1])
        for text, mine in zip(texts, labels, strict=True)
    )
    targets = np.where(batch.weights > 0, batch.targets, -1)
    of_tokens, of_labels = (_parts(a, batch.segments) for a in (batch.tokens, targets))
    assert sorted((of_tokens[key], of_labels[key]) for key in of_tokens) == expected
    assert set(np.unique(batch.weights)) <= {0.0, 1.0} and batch.targets.min() >= 0


def test_answers_of_an_encoder(caplog):
    questions = [[1, 2], [1, 2], [1, 2], [3] * 40]
    contexts = [[5, 6, 7, 8], [5, 6], list(range(50, 90)), [9] * 40]
    answers = [[1, 2], [-1, -1], [26, 27], [13, 13]]
    cache = _cache([questions, contexts], answers)
    with caplog.at_level(logging.WARNING):
        stage = _stage(cache, "span", "encoder", num_token_types=2)
    batch = _batch(stage)
    assert batch.tokens[0][:9].tolist() == [CLS, 1, 2, EOS, 5, 6, 7, 8, EOS]
    first, last = batch.targets[0]
    assert batch.tokens[0][first : last + 1].tolist() == [6, 7]
    assert batch.targets[1].tolist() == [0, 0]
    # The question stays: 32 - 3 - 2 = 27 tokens of the context, of which number 27 is not one.
    assert batch.tokens[2].tolist() == [CLS, 1, 2, EOS, *range(50, 77), EOS]
    # A question that is longer than half of the row is cut to it: 14 and 15 of 29.
    assert batch.tokens[3].tolist() == [CLS, *[3] * 14, EOS, *[9] * 15, EOS]
    assert batch.weights.tolist() == [1.0, 1.0, 0.0, 1.0]
    assert batch.targets[3].tolist() == [29, 29]
    assert "1 of the 4 examples in split 'train' of test have their answer cut off" in caplog.text
    decoded = _batch(_stage(cache, "span", "decoder"))
    assert decoded.tokens[1][: decoded.targets[1][0] + 1].tolist() == [1, 2, EOS, 5, 6, EOS]


# --- purity -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective, architecture", [("seq2seq", "encoder_decoder"), ("token", "encoder")]
)
def test_batches_do_not_depend_on_hosts_or_restarts(objective, architecture):
    lengths = np.random.default_rng(0).integers(1, 14, 300).tolist()
    texts = _random(lengths)
    cache = _cache([texts], texts if objective == "seq2seq" else [[1] * n for n in lengths])
    stage = _stage(cache, objective, architecture)
    data = config_lib.DataConfig(batch_size=8)

    def batches(start, count, num_hosts):
        hosts = [
            list(
                pipeline.train_batches(
                    stage, data, seed=1, start_step=start, rows=rows, num_steps=count
                )
            )
            for rows in np.split(np.arange(8), num_hosts)
        ]
        return [
            [np.concatenate(field) for field in zip(*parts, strict=True) if field[0] is not None]
            for parts in zip(*hosts, strict=True)
        ]

    whole = batches(0, 30, 1)
    for mine, theirs in zip(batches(7, 3, 4), whole[7:10], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    # Each row once in an epoch.
    rows = [row.tobytes() for fields in whole for row in fields[0]][: stage.num_items]
    expected = [row.tobytes() for row in _batch(stage).tokens]
    assert len(whole) * 8 > stage.num_items and sorted(rows) == sorted(expected)


@pytest.mark.parametrize("num_items", [1, 5])
def test_evaluation_is_every_example_once(num_items):
    cache = _cache([[[i + 1] for i in range(num_items)]], [[i % 2] for i in range(num_items)])
    stage = _stage(cache, "sequence", "encoder")
    data = config_lib.DataConfig(batch_size=4)
    batches = list(pipeline.eval_batches(stage, data, rows=range(4)))
    weights = np.concatenate([batch.weights for batch in batches])
    targets = np.concatenate([batch.targets for batch in batches])
    assert weights.sum() == num_items and len(weights) % 4 == 0
    assert targets[weights > 0].tolist() == [i % 2 for i in range(num_items)]


def test_pairs_are_two_texts_of_a_row_that_do_not_see_each_other():
    cache = _cache([[[1, 2, 3], [4], list(range(1, 60))]], [[5, 6], [7], list(range(100, 140))])
    stage = _stage(cache, "contrastive", "encoder", length=16)
    batch = _batch(stage, [1, 0, -1, 2])
    cls, sep = stage._first[0], stage._sep
    assert batch.tokens[0, :6].tolist() == [cls, 4, sep, cls, 7, sep]
    assert batch.tokens[1, :9].tolist() == [cls, 1, 2, 3, sep, cls, 5, 6, sep]
    assert batch.segments[1].tolist() == [1] * 5 + [2] * 4 + [0] * 7
    assert batch.positions[1].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3] + [0] * 7
    assert batch.weights.tolist() == [1.0, 1.0, 0.0, 1.0]
    # Both are cut to what fits beside four special tokens.
    assert batch.tokens[3, 1:7].tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.tokens[3, 9:15].tolist() == list(range(100, 106))


# --- what plans assume ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture, objective",
    [(one, name) for one, names in schema.OBJECTIVES_OF.items() for name in names],
)
def test_batches_have_the_shapes_that_plans_assume(architecture, objective):
    mesh, _ = helpers.make_mesh()
    for is_bidirectional, num_types in itertools.product((False, True), (0, 2)):
        changes = {"is_input_bidirectional": is_bidirectional}
        changes |= {"num_token_types": num_types} if architecture == "encoder" else {}
        if objective in config_lib.TEXT_OBJECTIVES:
            config = streams.run_config(
                objective, architecture, is_input_bidirectional=is_bidirectional
            )
            model = dataclasses.replace(
                config.model, num_token_types=changes.get("num_token_types", 0)
            )
            config = dataclasses.replace(config, model=model)
            stage, _ = streams.make(config, streams.mixed())
        else:
            inputs = [[[1]], [[2]]] if objective in ("span", "preference") else [[[1]]]
            target = [[0, 0]] if objective == "span" else [[1]]
            stage = _stage(_cache(inputs, target), objective, architecture, **changes)
            config = stage._config
        data = dataclasses.replace(config.data, batch_size=3)
        expected = steps.abstract_batch(dataclasses.replace(config, data=data), mesh)
        if objective == "preference":  # which the model of the start adds
            assert expected.reference.shape == (3, 2)
            expected = expected._replace(reference=None)
        made = _batch(stage, [0, -1, -1])
        for name, mine, theirs in zip(made._fields, made, expected, strict=True):
            assert (mine is None) == (theirs is None), name
            if mine is not None:
                assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), name
