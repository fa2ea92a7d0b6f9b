"""Cuts a stream of tokens into windows, and says where documents begin and end inside them.

Window i of length T has the inputs i*T ... i*T + T-1 and, one further, their targets. Each token of
the stream is an input exactly once, but for the last one, which nothing follows. With a stride of less than T
windows overlap, and each target has a weight in the first window that holds it alone. Documents end with
`eos_id`, which occurs nowhere else (the token cache sees to that), so boundaries are read off the
tokens themselves. Pure numpy.
"""

from typing import NamedTuple

import numpy as np

from llm_jax import errors
from llm_jax.data import batch as batch_lib
from llm_jax.data import token_cache

PACKED = "packed"
CONCAT = "concat"


class Text(NamedTuple):
    """Windows of tokens without targets, each int32 [B, T]; as in `batch.Batch`."""

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


def num_windows(num_tokens: int, length: int, stride: int | None = None) -> int:
    """Returns how many windows of `length` inputs, `stride` apart, a stream of `num_tokens` gives."""
    stride = length if stride is None else stride
    num_inputs = num_tokens - 1
    return 1 + max(0, -(-(num_inputs - length) // stride)) if num_inputs > 0 else 0


def windows(
    cache: token_cache.TokenCache,
    indices: np.ndarray,
    *,
    length: int,
    packing: str,
    stride: int | None = None,
) -> batch_lib.Batch:
    """Reads windows into a batch.

    Args:
      cache: the token stream.
      indices: [B], the window of each row; -1 for a row of padding.
      length: T, inputs of a window.
      packing: "packed" restarts segments and positions at each document and drops the target that
        belongs to the next document; "concat" treats the stream as one text.
      stride: tokens from one window to the next, in [1, length]; None: `length`. What windows share has
        a weight in the first of them.

    Returns:
      A batch of numpy arrays, [B, T].

    Raises:
      errors.UserError: an unknown packing.
      IndexError: a window that the stream does not have.
    """
    stride = length if stride is None else stride
    _check(packing, indices, num_windows(cache.num_tokens, length, stride))
    stream, num_tokens = _read(cache, indices, stride, length + 1)
    # The last token of the stream is a target only; as an input of the padding it must not show.
    is_input = np.arange(length) < num_tokens - 1
    tokens = np.where(is_input, stream[:, :-1], np.int32(cache.pad_id))
    segments, positions = _places(tokens, is_input, cache.eos_id, packing)
    is_predicted = is_input if packing == CONCAT else is_input & (tokens != cache.eos_id)
    is_new = (np.arange(length) >= length - stride) | (indices[:, None] == 0)
    weights = (is_predicted & is_new).astype(np.float32)
    return batch_lib.Batch(tokens, stream[:, 1:].copy(), weights, segments, positions)


def num_texts(num_tokens: int, length: int) -> int:
    """Returns how many windows of `length` tokens a stream of `num_tokens` gives."""
    return -(-num_tokens // length)


def texts(cache: token_cache.TokenCache, indices: np.ndarray, *, length: int, packing: str) -> Text:
    """Reads windows whose tokens are to be predicted where they stand; arguments as of `windows`.

    Window i has the tokens i*T ... i*T + T-1: each token of the stream is in one window.
    """
    _check(packing, indices, num_texts(cache.num_tokens, length))
    tokens, num_tokens = _read(cache, indices, length, length)
    is_token = np.arange(length) < num_tokens
    return Text(tokens, *_places(tokens, is_token, cache.eos_id, packing))


def segment_lengths(segments: np.ndarray) -> np.ndarray:
    """Returns the tokens of each segment of each row, int32 [B, 1 + most segments of a row]."""
    num_rows, most = len(segments), int(segments.max(initial=0)) + 1
    flat = segments + np.arange(num_rows)[:, None] * most
    counts = np.bincount(flat.ravel(), minlength=num_rows * most)
    return counts.reshape(num_rows, most).astype(np.int32)


def _check(packing: str, indices: np.ndarray, count: int) -> None:
    if packing not in (PACKED, CONCAT):
        hint = errors.nearest(packing, (PACKED, CONCAT))
        raise errors.UserError(f"packing {packing!r} is not known: use packed or concat{hint}")
    if np.any(indices >= count) or np.any(indices < -1):
        raise IndexError(f"windows {indices} of {count}")


def _places(
    tokens: np.ndarray, is_token: np.ndarray, eos_id: int, packing: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns segments and positions, int32 [B, T], of rows whose padding comes last."""
    offsets = np.arange(tokens.shape[1], dtype=np.int32)
    if packing == CONCAT:
        return is_token.astype(np.int32), np.where(is_token, offsets, 0).astype(np.int32)
    is_start = np.zeros(tokens.shape, bool)
    is_start[:, 1:] = tokens[:, :-1] == eos_id
    segments = np.where(is_token, 1 + np.cumsum(is_start, axis=1, dtype=np.int32), 0)
    starts = np.maximum.accumulate(np.where(is_start, offsets, 0), axis=1)
    positions = np.where(is_token, offsets - starts, 0)
    return segments.astype(np.int32), positions.astype(np.int32)


def _read(
    cache: token_cache.TokenCache, indices: np.ndarray, stride: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `length` tokens from index * stride on, [B, length], padded, and how many, [B, 1]."""
    stream = np.full((len(indices), length), cache.pad_id, np.int32)
    num_tokens = np.zeros((len(indices), 1), np.int32)
    for row, index in enumerate(indices):
        if index >= 0:
            # A slice of the memory map a row: it reads pages in order, and converts as it copies.
            part = cache.tokens[index * stride : index * stride + length]
            stream[row, : len(part)] = part
            num_tokens[row] = len(part)
    return stream, num_tokens
