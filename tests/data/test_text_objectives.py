"""Objectives of text: statistics, purity, and that nothing is lost or shown too early."""

import dataclasses
import itertools

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from llm_jax.data import objectives
from llm_jax.data import pipeline
from tests.data import streams

CASES = [
    ("causal", "decoder"),
    ("prefix", "decoder"),
    ("mlm", "encoder"),
    ("span_corruption", "encoder_decoder"),
    ("span_corruption", "decoder"),
    ("ul2", "encoder_decoder"),
    ("ul2", "decoder"),
]
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda ls: sum(ls) > 1)


@pytest.fixture(scope="module")
def long_stream():
    return streams.mixed()


def _assert_same(mine, theirs):
    for name, a, b in zip(mine._fields, mine, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, name)


def _rows_of(batch, rows):
    return batch._replace(
        **{name: field[rows] for name, field in batch._asdict().items() if field is not None}
    )


# --- draws ------------------------------------------------------------------------------------


def test_draws_are_frozen():
    """A run that resumes under a newer NumPy must go on as it was."""
    draws = objectives.Draws(7).uniform(np.array([0, 3]), 2)
    np.testing.assert_array_equal(draws, FROZEN)


def test_draws_depend_on_the_row_and_nothing_else():
    draws = objectives.Draws(1)
    rows = np.array([5, 0, 9, 1 << 40])
    whole = draws.uniform(rows, 100)
    np.testing.assert_array_equal(draws.uniform(rows[::-1], 100), whole[::-1])
    np.testing.assert_array_equal(draws.uniform(rows[1:2], 7), whole[1:2, :7])
    others = [
        draws.uniform(rows, 100, stream=1),
        draws.uniform(rows + 1, 100),
        objectives.Draws(2).uniform(rows, 100),
        dataclasses.replace(draws, purpose=1).uniform(rows, 100),
    ]
    for one, two in itertools.combinations([whole, *others], 2):
        assert not np.any(one == two)


def test_draws_are_uniform():
    numbers = objectives.Draws(0).uniform(np.arange(100), 1000).ravel()
    assert 0.0 <= numbers.min() and numbers.max() < 1.0
    for count in np.histogram(numbers, 20, (0, 1))[0]:
        assert streams.share_is(count, numbers.size, 1 / 20)


FROZEN = [[0.8720734548204873, 0.29536538151378355], [0.7545134190860097, 0.976164072590892]]


# --- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["packed", "concat"])
@pytest.mark.parametrize("name, architecture", CASES)
def test_a_row_follows_from_its_item_and_number(long_stream, name, architecture, packing):
    config = streams.run_config(name, architecture, packing=packing)
    stage, _ = streams.make(config, long_stream)
    items, rows = np.array([3, 0, 7, 7, 20]), np.array([10, 11, 500, 12, 1 << 33])
    draws = objectives.Draws(4)
    whole = stage(items, rows, draws)
    for i in range(len(items)):
        alone = stage(items[i : i + 1], rows[i : i + 1], draws)
        _assert_same(alone, _rows_of(whole, slice(i, i + 1)))
    if name != "causal":
        assert not np.array_equal(whole.weights[2], whole.weights[3]) or not np.array_equal(
            whole.tokens[2], whole.tokens[3]
        ), "epochs must differ"


@pytest.mark.parametrize("name, architecture", CASES)
def test_padding_rows_are_empty(long_stream, name, architecture):
    stage, _ = streams.make(streams.run_config(name, architecture), long_stream)
    batch = streams.batch(stage, items=[0, -1])
    assert batch.segments[0].any() and batch.weights[0].any()
    for field in ("weights", "segments", "positions", "encoder_segments", "encoder_positions"):
        value = getattr(batch, field)
        assert value is None or not value[1].any(), field
    assert np.all(batch.tokens[1] == streams.EOS)
    assert batch.prefix is None or not batch.prefix[1].any()


@pytest.mark.parametrize("name, architecture", [CASES[1], CASES[2], CASES[3]])
def test_batches_do_not_depend_on_hosts_or_restarts(long_stream, name, architecture):
    config = streams.run_config(name, architecture)
    stage, _ = streams.make(config, long_stream)

    def batches(start, count, num_hosts):
        hosts = [
            list(
                pipeline.train_batches(
                    stage, config.data, seed=3, start_step=start, rows=rows, num_steps=count
                )
            )
            for rows in np.split(np.arange(config.data.batch_size), num_hosts)
        ]
        return [
            parts[0]._replace(
                **{
                    field: np.concatenate([getattr(part, field) for part in parts])
                    for field, value in parts[0]._asdict().items()
                    if value is not None
                }
            )
            for parts in zip(*hosts, strict=True)
        ]

    whole = batches(0, 4, 1)
    for mine, theirs in zip(batches(2, 2, 4), whole[2:], strict=True):
        _assert_same(mine, theirs)


@pytest.mark.parametrize("name, architecture", [CASES[1], CASES[2], CASES[3]])
def test_evaluation_draws_the_same_whatever_the_batch_size(long_stream, name, architecture):
    config = streams.run_config(name, architecture)
    stage, _ = streams.make(config, long_stream)

    def evaluated(batch_size):
        data = dataclasses.replace(config.data, batch_size=batch_size)
        batches = list(pipeline.eval_batches(stage, data, rows=range(batch_size)))
        assert len(batches) == pipeline.num_eval_steps(stage, data)
        fields = zip(*(b[:5] for b in batches), strict=True)
        return [np.concatenate(field)[: stage.num_items] for field in fields]

    for mine, theirs in zip(evaluated(8), evaluated(19), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    drawn = streams.batch(stage)
    differ = [not np.array_equal(a, b) for a, b in zip(evaluated(8), drawn[:5], strict=True)]
    assert any(differ), "training must draw otherwise"


# --- prefix -----------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["packed", "concat"])
@hypothesis.given(lengths=LENGTHS, seed=st.integers(0, 9))
@hypothesis.settings(max_examples=30)
def test_targets_within_a_prefix_do_not_count(lengths, seed, packing):
    config = streams.run_config("prefix", "decoder", length=16, packing=packing)
    stream = streams.of_lengths(lengths)
    batch = streams.batch(streams.make(config, stream)[0], seed)
    causal_config = streams.run_config("causal", "decoder", length=16, packing=packing)
    causal = streams.batch(streams.make(causal_config, stream)[0])
    _assert_same(batch._replace(prefix=None, weights=causal.weights), causal)
    for row, segments in enumerate(batch.segments):
        for segment in range(1, segments.max() + 1):
            members = np.flatnonzero(segments == segment)
            is_prefix = batch.prefix[row, members]
            count = int(is_prefix.sum())
            assert is_prefix[:count].all(), "a prefix is a beginning"
            expected = causal.weights[row, members].copy()
            expected[: max(count - 1, 0)] = 0.0
            np.testing.assert_array_equal(batch.weights[row, members], expected)
    assert not batch.prefix[batch.segments == 0].any()


def test_prefix_lengths_are_uniform_and_of_each_document():
    stream = streams.of_lengths([15] * 8000)  # with eos 16: two in a row of 32
    stage, _ = streams.make(streams.run_config("prefix", "decoder", length=32), stream)
    batch = streams.batch(stage)
    first, second = (np.sum(batch.prefix & (batch.segments == s), axis=1) for s in (1, 2))
    lengths = np.concatenate([first, second])[:-1]  # the last document lacks its eos
    for length in range(17):
        assert streams.share_is(np.sum(lengths == length), len(lengths), 1 / 17), length
    # Their correlation is that of independent numbers.
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(len(first))


def test_prefix_shares_keep_their_bounds():
    config = streams.run_config("prefix", "decoder", length=100, min_prefix=0.25, max_prefix=0.5)
    batch = streams.batch(streams.make(config, streams.of_lengths([100 * 300]))[0])
    lengths = batch.prefix[:300].sum(axis=1)
    assert lengths.min() == 25 and lengths.max() == 50


# --- mlm --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masked(long_stream):
    stage, tokenizer = streams.make(streams.run_config("mlm", "encoder", length=65), long_stream)
    return streams.batch(stage), tokenizer


def test_masked_rates(masked):
    batch, tokenizer = masked
    may = (batch.segments > 0) & ~tokenizer.is_special_V[batch.targets]
    is_chosen = batch.weights > 0
    assert streams.share_is(is_chosen.sum(), may.sum(), 0.15)
    is_hidden = is_chosen & (batch.tokens == tokenizer.mask_id)
    is_other = is_chosen & ~is_hidden & (batch.tokens != batch.targets)
    assert streams.share_is(is_hidden.sum(), is_chosen.sum(), 0.8)
    # A random token is the one that was there once in 255 times.
    assert streams.share_is(is_other.sum(), is_chosen.sum(), 0.1 * 254 / 255)
    seen = np.bincount(batch.tokens[is_other], minlength=256)
    assert seen[0] == 0 and np.count_nonzero(seen) > 250, "all ordinary tokens are drawn"


def test_masked_texts_are_whole_but_for_the_chosen(masked, long_stream):
    batch, tokenizer = masked
    is_token = batch.segments > 0
    np.testing.assert_array_equal(batch.targets[:, 1:][is_token[:, 1:]], long_stream.tokens)
    is_same = batch.tokens == batch.targets
    assert is_same[batch.weights == 0].all()
    assert set(np.unique(batch.weights)) == {0.0, 1.0}
    assert not np.any(tokenizer.is_special_V[batch.targets] & (batch.weights > 0))
    assert np.all(batch.tokens[:, 0] == tokenizer.cls_id) and np.all(batch.segments[:, 0] == 1)
    row = int(np.argmax(batch.segments.max(axis=1)))
    starts = np.flatnonzero(np.diff(batch.segments[row])) + 1
    assert starts.size > 1 and not batch.positions[row, [0, *starts]].any()
    np.testing.assert_array_equal(batch.positions[row, : starts[0]], range(starts[0]))


def test_whole_words():
    words = [b"the", b"union", b" of", b" states", b"!?", b"  ", b"\n", b" it's", b" 1790"]
    rng = np.random.default_rng(0)
    text = b"".join(words[i] for i in rng.integers(0, len(words), 20_000))
    stream = streams.Stream(np.frombuffer(text + b"\0", np.uint8))
    config = streams.run_config("mlm", "encoder", length=129, use_whole_words=True)
    stage, tokenizer = streams.make(config, stream)
    batch = streams.batch(stage)
    starts = tokenizer.word_starts(batch.targets)
    is_inside = ~starts & (batch.segments > 0)
    changes = batch.weights[:, 1:] != batch.weights[:, :-1]
    assert not np.any(changes & is_inside[:, 1:]), "a word is chosen as one"
    may = (batch.segments > 0) & ~tokenizer.is_special_V[batch.targets]
    # Words are drawn, of up to 7 letters: the share of tokens varies as that of fewer draws.
    assert streams.share_is(batch.weights.sum() / 7, may.sum() / 7, 0.15)
    assert streams.share_is((batch.weights * starts).sum(), (may & starts).sum(), 0.15)


def test_mask_rate_is_a_setting(long_stream):
    config = streams.run_config("mlm", "encoder", mask_rate=0.4)
    batch = streams.batch(streams.make(config, long_stream)[0])
    assert streams.share_is(batch.weights.sum(), (batch.targets != streams.EOS).sum(), 0.4, 15)
