"""Batches are a pure function of (seed, step): of no host count, restart or prefetch."""

import dataclasses
import itertools
import pathlib
import subprocess
import sys

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from llm_jax import config
from llm_jax import errors
from llm_jax.data import host_tensorflow
from llm_jax.data import objectives
from llm_jax.data import pipeline
from llm_jax.data import token_cache
from llm_jax.data import tokenizer

ROOT = pathlib.Path(__file__).parents[2]
BATCH, LENGTH = 8, 5
DATA = config.DataConfig(batch_size=BATCH, sequence_length=LENGTH, prefetch=2)
EOS = 0


def _write(path, lengths):
    """Writes a cache in which every token but eos is unique."""
    starts = itertools.accumulate(lengths, initial=1)
    documents = [(np.arange(s, s + n), n) for s, n in zip(starts, lengths, strict=False)]
    return token_cache.write(
        path,
        documents,
        source="test",
        split="train",
        tokenizer="none",
        tokenizer_fingerprint="",
        vocab_size=1 << 16,
        eos_id=EOS,
        pad_id=EOS,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    rng = np.random.default_rng(0)
    return _write(tmp_path_factory.mktemp("cache") / "c", rng.integers(1, 20, 40).tolist())


def _stage(cache, data=DATA):
    return objectives.make(config.RunConfig(data=data), cache, tokenizer.load("bytes"))


def _steps(cache, *, data=DATA, seed=0, start=0, count=4, num_hosts=1):
    """Returns the global batches of some steps, put together from each host's rows."""
    per_host = np.split(np.arange(data.batch_size), num_hosts)
    hosts = [
        list(
            pipeline.train_batches(
                _stage(cache, data), data, seed=seed, start_step=start, rows=rows, num_steps=count
            )
        )
        for rows in per_host
    ]
    return [
        [np.concatenate(field) for field in zip(*map(_fields, parts), strict=True)]
        for parts in zip(*hosts, strict=True)
    ]


def _fields(batch):
    return [field for field in batch if field is not None]


def _assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        for a, b in zip(_fields(mine), _fields(theirs), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def uninterrupted(cache):
    """Twelve steps: more than an epoch."""
    assert _stage(cache).num_items < 12 * BATCH
    return _steps(cache, count=12)


@hypothesis.given(
    start=st.integers(0, 11),
    count=st.integers(1, 6),
    num_hosts=st.sampled_from([1, 2, 4]),
    prefetch=st.integers(0, 5),
)
@hypothesis.settings(max_examples=25, deadline=None)
def test_same_stream_however_it_is_read(cache, uninterrupted, start, count, num_hosts, prefetch):
    count = min(count, 12 - start)
    data = dataclasses.replace(DATA, prefetch=prefetch)
    actual = _steps(cache, data=data, start=start, count=count, num_hosts=num_hosts)
    _assert_equal(actual, uninterrupted[start : start + count])


def test_rows_in_any_order(cache, uninterrupted):
    rows = np.array([6, 1, 3])
    (mine,) = pipeline.train_batches(
        _stage(cache), DATA, seed=0, start_step=3, rows=rows, num_steps=1
    )
    _assert_equal([mine], [[field[rows] for field in _fields(uninterrupted[3])]])


def test_endless_by_default(cache, uninterrupted):
    batches = pipeline.train_batches(_stage(cache), DATA, seed=0, start_step=0, rows=range(BATCH))
    _assert_equal(list(itertools.islice(batches, 12)), uninterrupted)


def _inputs(batches):
    """Returns the input tokens (no padding) in the order in which rows come."""
    return [b[0][row][b[3][row] > 0] for b in batches for row in range(len(b[0]))]


@pytest.mark.parametrize("packing", ["packed", "concat"])
def test_every_token_once_an_epoch(cache, packing):
    data = dataclasses.replace(DATA, packing=packing)
    count = _stage(cache, data).num_items
    rows = _inputs(_steps(cache, data=data, count=-(-3 * count // BATCH)))
    epochs = [rows[e * count : (e + 1) * count] for e in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(
            np.sort(np.concatenate(epoch)), np.sort(cache.tokens[:-1].astype(np.int32))
        )
    orders = {tuple(int(row[0]) for row in epoch) for epoch in epochs}
    assert len(orders) == 3, "epochs must differ in their order"


def test_seeds_differ(cache, uninterrupted):
    other = _steps(cache, seed=1, count=2)
    assert not np.array_equal(other[0][0], uninterrupted[0][0])


def test_order_is_frozen(tmp_path):
    """A run that resumes under a newer llm_jax or TensorFlow must go on where it was."""
    cache = _write(tmp_path / "c", [79])
    data = dataclasses.replace(DATA, sequence_length=8, batch_size=10)
    assert _stage(cache, data).num_items == 10
    first, second = _steps(cache, data=data, seed=7, count=2)
    assert (first[0][:, 0] // 8).tolist() == FROZEN[0]
    assert (second[0][:, 0] // 8).tolist() == FROZEN[1]


# Windows of seed 7 over 10 windows, in epochs 0 and 1; made with TensorFlow 2.21.
FROZEN = [[2, 3, 7, 1, 4, 8, 9, 6, 5, 0], [8, 2, 6, 7, 1, 9, 5, 4, 0, 3]]


@pytest.mark.parametrize("num_tokens", [2, 3, 6, 11])
def test_less_data_than_a_batch(tmp_path, num_tokens):
    cache = _write(tmp_path / "c", [num_tokens - 1])
    batches = _steps(cache, count=3)
    assert all(b[0].shape == (BATCH, LENGTH) for b in batches)
    seen = np.concatenate(_inputs(batches))
    assert set(seen) == set(cache.tokens[:-1])
    (evaluated,) = pipeline.eval_batches(_stage(cache), DATA, rows=range(BATCH))
    assert evaluated.weights.sum() == num_tokens - 1


def test_too_little_data(tmp_path):
    cache = _write(tmp_path / "c", [0])
    with pytest.raises(errors.UserError, match="is too small for a single row"):
        next(pipeline.train_batches(_stage(cache), DATA, seed=0, start_step=0, rows=[0]))
    with pytest.raises(errors.UserError, match="is too small for a single row"):
        next(pipeline.eval_batches(_stage(cache), DATA, rows=[0]))


def test_bad_rows(cache):
    with pytest.raises(errors.UserError, match=r"rows \[8\].*batch_size = 8"):
        next(pipeline.train_batches(_stage(cache), DATA, seed=0, start_step=0, rows=[BATCH]))


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_evaluation_is_the_split_in_order(cache, num_hosts):
    hosts = [
        list(pipeline.eval_batches(_stage(cache), DATA, rows=rows))
        for rows in np.split(np.arange(BATCH), num_hosts)
    ]
    batches = [
        [np.concatenate(field) for field in zip(*map(_fields, parts), strict=True)]
        for parts in zip(*hosts, strict=True)
    ]
    assert len(batches) == pipeline.num_eval_steps(_stage(cache), DATA)
    np.testing.assert_array_equal(np.concatenate(_inputs(batches)), cache.tokens[:-1])
    # In packed rows the loss counts each token but the first of each document, eos included.
    assert sum(b[2].sum() for b in batches) == cache.num_tokens - cache.num_documents
    assert _stage(cache).num_items % BATCH, "the last batch must need padding rows"
    assert batches[-1][0].shape == (BATCH, LENGTH) and batches[-1][2][-1].sum() == 0


def test_evaluation_of_few_steps(cache):
    whole = list(pipeline.eval_batches(_stage(cache), DATA, rows=range(BATCH)))
    assert pipeline.num_eval_steps(_stage(cache), DATA, 2) == 2 < len(whole)
    _assert_equal(
        list(pipeline.eval_batches(_stage(cache), DATA, rows=range(BATCH), num_steps=2)), whole[:2]
    )
    assert pipeline.num_eval_steps(_stage(cache), DATA, 10_000) == len(whole)


def test_tensorflow_sees_no_accelerator(monkeypatch):
    hidden = []
    monkeypatch.setattr(pipeline.tf.config, "get_visible_devices", lambda kind: [f"{kind}:0"])
    monkeypatch.setattr(
        pipeline.tf.config,
        "set_visible_devices",
        lambda devices, kind: hidden.append((devices, kind)),
    )
    host_tensorflow.load()
    assert hidden == [([], "GPU"), ([], "TPU")]


def test_only_the_pipeline_imports_tensorflow():
    """It takes seconds, which sampling and the handling of files need not wait for."""
    code = """
import os, sys
from llm_jax.data import batch, objectives, packing, prepare, sources, token_cache, tokenizer
assert "tensorflow" not in sys.modules
from llm_jax.data import pipeline
assert "tensorflow" in sys.modules
assert "keras" not in sys.modules
assert "TF_USE_LEGACY_KERAS" not in os.environ
assert pipeline.tf.keras.__version__.startswith("3.")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
