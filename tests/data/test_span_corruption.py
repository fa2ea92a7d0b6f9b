"""Span corruption and UL2: T5's arithmetic and statistics, and texts that can be put together again."""

import dataclasses

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from llm_jax import errors
from llm_jax.data import objectives
from tests.data import streams

CASES = [
    ("span_corruption", "encoder_decoder"),
    ("span_corruption", "decoder"),
    ("ul2", "encoder_decoder"),
    ("ul2", "decoder"),
]
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda ls: sum(ls) > 1)


@pytest.fixture(scope="module")
def long_stream():
    return streams.mixed()


def _texts(stream, window, packing):
    """The texts of each window, one token at a time."""
    rows = []
    for begin in range(0, stream.num_tokens, window):
        texts = [[]]
        for token in stream.tokens[begin : begin + window].tolist():
            texts[-1].append(token)
            if token == streams.EOS and packing == "packed":
                texts.append([])
        rows.append([text for text in texts if text])
    return rows


def _parts(tokens, segments):
    """The tokens of each segment of a row."""
    return {int(s): tokens[segments == s].tolist() for s in np.unique(segments) if s > 0}


def _restored(inputs, targets, sentinels):
    """Puts spans back where their sentinels are, which must be in order in both."""
    spans, number = {}, -1
    for token in targets:
        if number + 1 < len(sentinels) and token == sentinels[number + 1]:
            number += 1
            spans[token] = []
        else:
            spans[sentinels[number]].append(token)
    used = [token for token in inputs if token in sentinels]
    assert used == sentinels[: len(used)] and list(spans) == used
    assert all(spans.values()), "no span is empty"
    return [t for token in inputs for t in spans.get(token, [token])]


def _inputs_and_targets(batch, row, architecture):
    """Returns the inputs and the targets of each segment of a row."""
    if architecture == "encoder_decoder":
        inputs = _parts(batch.encoder_tokens[row], batch.encoder_segments[row])
        return inputs, _parts(batch.targets[row], batch.segments[row])
    inputs, targets = {}, {}
    for segment, tokens in _parts(batch.tokens[row], batch.segments[row]).items():
        weights = batch.weights[row][batch.segments[row] == segment]
        count = int(weights.sum())
        first = int(np.argmax(weights)) + 1 if count else len(tokens)
        assert first + count == len(tokens)
        inputs[segment] = tokens[:first]
        targets[segment] = batch.targets[row][batch.segments[row] == segment][
            first - 1 : first - 1 + count
        ].tolist()
        assert targets[segment] == tokens[first:]
    return inputs, targets


def _text_of(inputs, targets, text, architecture, sentinels):
    """Puts a text together again, without the eos of one that goes on in the next window."""
    if targets != [streams.EOS]:  # as they are where no span was taken out
        restored = _restored(inputs, targets, sentinels)
        if restored == text[: len(restored)]:
            return restored
    assert targets.pop() == streams.EOS
    if architecture == "encoder_decoder":
        assert inputs.pop() == streams.EOS
    return _restored(inputs, targets, sentinels)


@pytest.mark.parametrize("packing", ["packed", "concat"])
@pytest.mark.parametrize("name, architecture", CASES)
@hypothesis.given(lengths=LENGTHS, seed=st.integers(0, 99))
@hypothesis.settings(max_examples=25)
def test_inputs_and_targets_are_the_text(lengths, seed, name, architecture, packing):
    stream = streams.of_lengths(lengths)
    config = streams.run_config(name, architecture, length=32, target_length=32, packing=packing)
    stage, tokenizer = streams.make(config, stream)
    sentinels = tokenizer.sentinel_ids
    batch = streams.batch(stage, seed)
    modes = {tokenizer.special_tokens.get(mode) for mode in ("[R]", "[S]", "[X]")}
    expected_rows = _texts(stream, stage._window, packing)
    assert len(expected_rows) == stage.num_items
    for row, texts in enumerate(expected_rows):
        inputs, targets = _inputs_and_targets(batch, row, architecture)
        assert targets.keys() <= inputs.keys() and list(inputs) == [*range(1, len(inputs) + 1)]
        given = []
        for number, mine in inputs.items():
            assert name != "ul2" or mine.pop(0) in modes
            aims, text = targets.get(number, []), texts[number - 1]
            given.append(_text_of(mine, aims, text, architecture, sentinels))
        # What has no room is the end of a window: some documents, and the end of one.
        assert given[:-1] == texts[: len(given) - 1]
        assert given[-1] == texts[len(given) - 1][: len(given[-1])]
        if name == "span_corruption" and packing == "concat":
            assert given == texts


def _t5_lengths(inputs_length, density, mean_length):
    """T5's `random_spans_helper`: tokens of text, and the targets of its rows."""

    def lengths(num_tokens):
        num_noise = round(num_tokens * density)
        num_spans = round(num_noise / mean_length)
        return num_tokens - num_noise + num_spans + 1, num_noise + num_spans + 1

    num_tokens = inputs_length - 1
    while lengths(num_tokens + 1)[0] <= inputs_length:
        num_tokens += 1
    return num_tokens, lengths(num_tokens)[1]


@pytest.mark.parametrize(
    "length, density, mean", [(512, 0.15, 3.0), (128, 0.5, 5.0), (77, 0.2, 1.5)]
)
def test_rows_are_filled_by_t5s_arithmetic(length, density, mean):
    window, target_length = _t5_lengths(length, density, mean)
    assert (length, density) != (512, 0.15) or (window, target_length) == (568, 114)  # the paper's
    objective = {"noise_density": density, "mean_span_length": mean}
    config = streams.run_config(
        "span_corruption",
        "encoder_decoder",
        length=length,
        target_length=target_length,
        **objective,
    )
    # Documents of no less than 30 tokens, and an end in the midst of one.
    rng = np.random.default_rng(1)
    stream = streams.of_lengths(rng.integers(30, 300, 200).tolist())
    stage, _ = streams.make(config, streams.Stream(stream.tokens[: 40 * window]))
    assert stage.num_items == 40
    batch = streams.batch(stage)
    # A row whose last token is an eos is not given another one.
    ends = stream.tokens[window - 1 : 40 * window : window] == streams.EOS
    np.testing.assert_array_equal(np.sum(batch.encoder_segments == 0, axis=1), ends)
    np.testing.assert_array_equal(np.sum(batch.segments == 0, axis=1), ends)
    np.testing.assert_array_equal(batch.weights, batch.segments > 0)
    alone = streams.run_config("span_corruption", "decoder", length=length, **objective)
    padding = np.sum(streams.batch(streams.make(alone, stream)[0]).segments[:-1] == 0, axis=1)
    assert padding.max() <= 3


@pytest.mark.parametrize("packing", ["packed", "concat"])
def test_noise_is_that_of_t5(packing, long_stream):
    window, target_length = _t5_lengths(256, 0.15, 3.0)
    config = streams.run_config(
        "span_corruption",
        "encoder_decoder",
        length=256,
        target_length=target_length,
        packing=packing,
    )
    stage, tokenizer = streams.make(config, long_stream)
    batch = streams.batch(stage)._replace(positions=None)
    is_sentinel = batch.targets >= 256
    num_spans = is_sentinel.sum(axis=1)[:-1]
    num_noise = (batch.weights > 0).sum(axis=1)[:-1] - num_spans
    last_tokens = long_stream.tokens[window - 1 :: window][: len(num_noise)]
    num_noise -= last_tokens != streams.EOS  # T5's eos
    assert set(num_noise) == {round(window * 0.15)}
    assert set(num_spans) == {round(round(window * 0.15) / 3.0)}
    del tokenizer


def test_all_masks_are_as_likely():
    """Of 7 tokens with 3 of noise in 2 spans: 2 ways to cut 3, 3 ways to cut 4."""
    config = streams.run_config(
        "span_corruption",
        "encoder_decoder",
        length=7,
        target_length=6,
        noise_density=0.43,
        mean_span_length=1.5,
        packing="concat",
    )
    stage, tokenizer = streams.make(config, streams.of_lengths([7 * 6000]))
    assert stage._window == 7
    batch = streams.batch(stage)
    is_sentinel = batch.encoder_tokens[:6000] >= tokenizer.sentinel_ids[-1]
    targets = batch.targets[:6000] >= tokenizer.sentinel_ids[-1]
    masks, counts = np.unique(np.concatenate([is_sentinel, targets], 1), axis=0, return_counts=True)
    assert len(masks) == 6
    assert all(streams.share_is(count, 6000, 1 / 6) for count in counts), counts


def test_noise_is_dealt_out_fairly():
    """Each document has its share of noise on average, wherever it stands in a window."""
    lengths = np.tile([10, 20, 3, 40], 2000)
    stream = streams.of_lengths((lengths - 1).tolist())
    density, mean = 0.2, 2.0
    config = streams.run_config(
        "span_corruption",
        "encoder_decoder",
        length=67,
        target_length=24,
        noise_density=density,
        mean_span_length=mean,
    )
    stage, _ = streams.make(config, stream)
    assert stage._window == 73, "each window has the four documents"
    batch = streams.batch(stage)
    for number, length in enumerate(lengths[:4].tolist(), start=1):
        is_mine = batch.segments == number
        num_spans = (is_mine & (batch.targets >= 256)).sum() / stage.num_items
        num_noise = (is_mine & (batch.targets < 256)).sum() / stage.num_items
        assert num_spans == pytest.approx(length * 8 / 73, rel=0.05), number
        if length > 3:  # of which one may be hidden, or two
            assert num_noise == pytest.approx(length * 15 / 73, rel=0.05), number


def test_decoder_begins_anew_in_each_segment(long_stream):
    config = streams.run_config("span_corruption", "encoder_decoder")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, decoder_start_id=9)
    )
    batch = streams.batch(streams.make(config, long_stream)[0])
    is_token = batch.segments > 0
    is_first = is_token & (batch.positions == 0)
    assert np.all(batch.tokens[is_first] == 9) and (batch.segments.max(axis=1) > 1).any()
    is_later = is_token & ~is_first
    np.testing.assert_array_equal(batch.tokens[is_later], np.roll(batch.targets, 1, 1)[is_later])
    # Each text begins with the first sentinel, or is over where no span was taken out.
    assert set(batch.targets[is_first].tolist()) == {256 + 99, streams.EOS}
    for row in range(len(is_token)):
        firsts = np.flatnonzero(is_first[row])
        np.testing.assert_array_equal(
            batch.segments[row, firsts], np.unique(batch.segments[row])[-len(firsts) :]
        )


def test_decoders_may_see_inputs_both_ways(long_stream):
    for is_bidirectional in (True, False):
        config = streams.run_config(
            "span_corruption", "decoder", is_input_bidirectional=is_bidirectional
        )
        batch = streams.batch(streams.make(config, long_stream)[0])
        if not is_bidirectional:
            assert batch.prefix is None
            continue
        # The last input predicts the first target, all before it nothing.
        counted = batch.prefix & (batch.weights > 0)
        following = np.roll(batch.prefix, -1, 1) & (np.roll(batch.positions, -1, 1) > 0)
        assert counted.any() and not np.any(counted & following)
        assert np.all(batch.tokens[batch.prefix & (batch.positions == 0)] < 256)


def test_too_few_sentinels_or_too_short_rows(long_stream):
    config = streams.run_config("span_corruption", "decoder", length=256, num_sentinels=5)
    with pytest.raises(
        errors.UserError, match="12 spans, but there are 5 sentinels: set objective.n"
    ):
        streams.make(config, long_stream)
    config = streams.run_config("span_corruption", "encoder_decoder", length=64, target_length=2)
    with pytest.raises(errors.UserError, match="target_length = 2 hold no text"):
        streams.make(config, long_stream)


# --- UL2 --------------------------------------------------------------------------------------


def test_ul2_is_seven_denoisers_in_equal_shares():
    stream = streams.of_lengths([100] * 20_000)
    config = streams.run_config("ul2", "encoder_decoder", length=300, target_length=300)
    stage, tokenizer = streams.make(config, stream)
    rows = np.arange(5000)
    kinds = stage.kinds(rows, objectives.Draws(0))
    for count in np.bincount(kinds, minlength=7):
        assert streams.share_is(count, len(rows), 1 / 7)
    batch = streams.batch(stage, items=rows[:300])
    special = tokenizer.special_tokens
    for row, kind in enumerate(kinds[:300]):
        inputs, targets = _inputs_and_targets(batch, row, "encoder_decoder")
        mode, density, mean = MIXTURE[kind]
        assert all(mine[0] == special[mode] for mine in inputs.values())
        num_tokens = sum(map(len, inputs.values())) - len(inputs)
        num_noise = num_spans = 0
        for aims in targets.values():
            num_spans += sum(token >= 256 for token in aims)
            num_noise += sum(token < 256 for token in aims)
        assert num_noise / (num_tokens - num_spans + num_noise) == pytest.approx(density, abs=0.02)
        if mode == "[S]":
            for number, aims in targets.items():
                assert [token >= 256 for token in aims] == [True, *[False] * (len(aims) - 1)]
                mine = inputs[number][:-1] if inputs[number][-1] == streams.EOS else inputs[number]
                assert mine[-1] == aims[0] and max(mine[1:-1]) < 256
        else:
            assert num_noise / num_spans == pytest.approx(mean, rel=0.5 if mean == 64 else 0.1)


# Tay et al. 2022: R with spans of 3 and 8, S with a quarter, X with much noise or long spans.
MIXTURE = [
    ("[R]", 0.15, 3),
    ("[R]", 0.15, 8),
    ("[S]", 0.25, None),
    ("[X]", 0.5, 3),
    ("[X]", 0.5, 8),
    ("[X]", 0.15, 64),
    ("[X]", 0.5, 64),
]
