"""Windows of a token stream: every token once, and no document sees another."""

import dataclasses

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from llm_jax import errors
from llm_jax.data import batch
from llm_jax.data import packing

EOS, PAD = 0, 9


@dataclasses.dataclass
class FakeCache:
    """What packing reads of a TokenCache."""

    tokens: np.ndarray
    eos_id: int = EOS
    pad_id: int = PAD

    @property
    def num_tokens(self):
        return len(self.tokens)


# Lengths of documents, without eos; an empty one is only an eos.
LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda ls: sum(ls) > 1)
LENGTH = st.integers(1, 9)


def _stream(lengths):
    """Returns a cache of unique tokens (but for eos) and the document of each token."""
    tokens, owners, next_token = [], [], 10
    for owner, length in enumerate(lengths):
        tokens += [*range(next_token, next_token + length), EOS]
        owners += [owner] * (length + 1)
        next_token += length
    return FakeCache(np.array(tokens, np.uint16)), owners


def _all_windows(cache, length, kind):
    count = packing.num_windows(cache.num_tokens, length)
    return packing.windows(cache, np.arange(count), length=length, packing=kind)


def _reference(cache, owners, length, kind):
    """The definition, one token at a time."""
    rows = []
    last = cache.num_tokens - 1
    for begin in range(0, last, length):
        row, segment, position = [], 0, 0
        for place in range(begin, begin + length):
            if place >= last:
                row.append((PAD, 0, 0.0, 0, 0))
                continue
            is_new = place == begin or (kind == "packed" and owners[place] != owners[place - 1])
            segment, position = (segment + 1, 0) if is_new else (segment, position + 1)
            same = kind == "concat" or owners[place] == owners[place + 1]
            token, target = int(cache.tokens[place]), int(cache.tokens[place + 1])
            row.append((token, target, float(same), segment, position))
        rows.append(row)
    fields = np.moveaxis(np.array(rows), -1, 0)
    return batch.Batch(*fields)


@hypothesis.given(lengths=LENGTHS, length=LENGTH, kind=st.sampled_from(["packed", "concat"]))
def test_windows_are_as_defined(lengths, length, kind):
    cache, owners = _stream(lengths)
    actual = _all_windows(cache, length, kind)
    expected = _reference(cache, owners, length, kind)
    for name in ("tokens", "weights", "segments", "positions"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), name)
    counts = actual.segments > 0
    np.testing.assert_array_equal(actual.targets[counts], expected.targets[counts])
    assert [a.dtype.name for a in actual if a is not None] == [
        "int32",
        "int32",
        "float32",
        "int32",
        "int32",
    ]


@hypothesis.given(lengths=LENGTHS, length=LENGTH, kind=st.sampled_from(["packed", "concat"]))
def test_every_token_is_an_input_once(lengths, length, kind):
    cache, _ = _stream(lengths)
    windows = _all_windows(cache, length, kind)
    is_input = windows.segments > 0
    np.testing.assert_array_equal(windows.tokens[is_input], cache.tokens[:-1])
    np.testing.assert_array_equal(windows.targets[is_input], cache.tokens[1:])
    assert np.all(windows.tokens[~is_input] == PAD)
    assert np.all(windows.weights[~is_input] == 0)
    assert is_input[:, 0].all(), "a window without any input"


@hypothesis.given(lengths=LENGTHS, length=LENGTH)
def test_documents_do_not_leak(lengths, length):
    cache, owners = _stream(lengths)
    windows = _all_windows(cache, length, "packed")
    owner_of = {int(t): o for t, o in zip(cache.tokens, owners, strict=True) if t != EOS}
    for row in range(len(windows.tokens)):
        for segment in range(1, windows.segments[row].max() + 1):
            members = np.flatnonzero(windows.segments[row] == segment)
            weighted = members[windows.weights[row, members] > 0]
            seen = {owner_of[t] for t in windows.tokens[row, members].tolist() if t != EOS}
            aims = {owner_of[t] for t in windows.targets[row, weighted].tolist() if t != EOS}
            assert len(seen | aims) <= 1
            np.testing.assert_array_equal(windows.positions[row, members], range(len(members)))
    # Each document's tokens but the first are predicted somewhere, its eos included.
    assert windows.weights.sum() == sum(lengths)


def test_padding_rows_have_no_weight():
    cache, _ = _stream([5, 5])
    windows = packing.windows(cache, np.array([0, -1]), length=4, packing="packed")
    for mine, empty in zip(windows[:5], batch.empty(1, 4, PAD)[:5], strict=True):
        np.testing.assert_array_equal(mine[1:], empty)
    assert windows.weights[1].sum() == 0 and windows.weights[0].sum() > 0


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (1, 0), (2, 1), (5, 1), (6, 2), (9, 2)])
def test_num_windows(tokens, expected):
    assert packing.num_windows(tokens, 4) == expected


def test_bad_arguments():
    cache, _ = _stream([5])
    with pytest.raises(errors.UserError, match="did you mean 'packed'"):
        packing.windows(cache, np.array([0]), length=4, packing="pack")
    with pytest.raises(IndexError):
        packing.windows(cache, np.array([2]), length=4, packing="packed")
