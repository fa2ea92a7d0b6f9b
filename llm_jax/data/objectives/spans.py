"""Which tokens are noise, in spans: T5's `random_spans_noise_mask` for many texts at once.

Raffel et al. 2020, section 3.1.4; the arithmetic is that of `t5/data/preprocessors.py` in
https://github.com/google-research/text-to-text-transfer-transformer. A text of n tokens has
round(n * density) of noise, in round(that / mean length) spans. Spans of noise and of other tokens take
turns, beginning with others and ending with noise, and all such masks are equally likely.
"""

import numpy as np


def counts(
    lengths: np.ndarray, density: float, mean_length: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of noise and the spans of texts, int64; none in texts of a single token.

    Args:
      lengths: tokens of each text.
      density: of noise, in (0, 1).
      mean_length: of spans, in tokens, at least 1.
    """
    lengths = np.asarray(lengths, np.int64)
    num_noise = np.clip(np.rint(lengths * density), 1, np.maximum(lengths - 1, 1)).astype(np.int64)
    num_spans = np.maximum(np.rint(num_noise / mean_length), 1).astype(np.int64)
    # Each span, and each stretch before one, has a token.
    num_spans = np.minimum(num_spans, np.minimum(num_noise, lengths - num_noise))
    is_long_enough = lengths > 1
    return num_noise * is_long_enough, num_spans * is_long_enough


def apportion(
    lengths: np.ndarray,
    owners: np.ndarray,
    num_noise: np.ndarray,
    num_spans: np.ndarray,
    uniform: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Deals the noise and the spans of texts out to the documents that they are made of.

    Spans go by length, noise by spans, so each document's are what they would be on average if it
    were alone. The sums are those of the texts, unless documents are too short to hold them.

    Args:
      lengths: [P], tokens of each document's part of a text, in their order.
      owners: [P], the text of each, ascending.
      num_noise, num_spans: [B], of each text, as of `counts`.
      uniform: [B, 2], random numbers in [0, 1): which of two documents a remainder falls to.

    Returns:
      Tokens of noise and spans of each part, int64 [P].
    """
    spans = _dealt(num_spans, lengths, owners, uniform[:, 0])
    most_spans = lengths // 2
    spans = np.minimum(spans, most_spans)
    spans += _fill(num_spans - _sums(spans, owners, len(num_spans)), most_spans - spans, owners)
    noise = _dealt(num_noise, spans, owners, uniform[:, 1])
    most_noise = np.where(spans > 0, lengths - spans, 0)
    noise = np.clip(noise, np.minimum(spans, most_noise), most_noise)
    noise += _fill(num_noise - _sums(noise, owners, len(num_noise)), most_noise - noise, owners)
    return noise, spans


def _sums(values: np.ndarray, owners: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(owners, values, minlength=count).astype(np.int64)


def _before(values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Returns the sum of the values before each among those of its owner."""
    before = np.cumsum(values) - values
    return before - before[np.searchsorted(owners, owners)]


def _dealt(
    totals: np.ndarray, shares: np.ndarray, owners: np.ndarray, uniform: np.ndarray
) -> np.ndarray:
    """Splits totals in proportion to shares into whole numbers, unbiased by the random offset."""
    sums = np.maximum(_sums(shares, owners, len(totals)), 1)
    before = _before(shares, owners)
    edges = (
        np.floor(edge * totals[owners] / sums[owners] + uniform[owners])
        for edge in (before, before + shares)
    )
    low, high = edges
    return (high - low).astype(np.int64)


def _fill(left: np.ndarray, room: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Returns how much of what is left of each total goes where there is room, first come first."""
    return np.clip(np.maximum(left, 0)[owners] - _before(room, owners), 0, room)


def random_spans(
    lengths: np.ndarray,
    num_noise: np.ndarray,
    num_spans: np.ndarray,
    uniform: np.ndarray,
) -> np.ndarray:
    """Returns which tokens are noise, bool [sum of lengths].

    Args:
      lengths, num_noise, num_spans: [P], of each text, as of `counts`; without spans there is no noise.
      uniform: [sum of lengths], random numbers in [0, 1): a text's are at its tokens.
    """
    num_others = lengths - num_noise
    owners = np.repeat(np.arange(len(lengths)), lengths)
    places = np.arange(len(owners)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    is_of_noise = places < num_noise[owners]
    # A text of which nothing is noise is one stretch, with an empty span behind it.
    noise_lengths = _segment_lengths(num_noise, num_spans, uniform[is_of_noise])
    pieces = np.maximum(num_spans, 1)
    other_lengths = _segment_lengths(num_others, pieces, uniform[~is_of_noise])
    has_spans = np.repeat(num_spans > 0, pieces)
    all_noise = np.zeros(len(other_lengths), np.int64)
    all_noise[has_spans] = noise_lengths
    runs = np.stack([other_lengths, all_noise], axis=1).ravel()
    return np.repeat(np.tile([False, True], len(all_noise)), runs)


def _segment_lengths(
    num_items: np.ndarray, num_segments: np.ndarray, uniform: np.ndarray
) -> np.ndarray:
    """Cuts items at random into segments that are not empty; returns lengths, text after text.

    Of the items but the first of each text, those with the smallest numbers begin a segment.
    """
    owners = np.repeat(np.arange(len(num_items)), num_items)
    firsts = (np.cumsum(num_items) - num_items)[num_items > 0]
    key = owners + uniform
    key[firsts] = owners[firsts]  # before all others of its text
    order = np.argsort(key, kind="stable")
    ranks = np.arange(len(key)) - (np.cumsum(num_items) - num_items)[owners]
    begins = np.zeros(len(key), bool)
    begins[order] = ranks < num_segments[owners]
    return np.diff(np.append(np.flatnonzero(begins), len(key)))
