"""Cuts a stream of tokens into windows, and says where documents begin and end inside them.

Window i of length T has the inputs i*T ... i*T + T-1 and, one further, their targets. Each token of
the stream is an input exactly once, but for the last one, which nothing follows. Documents end with
`eos_id`, which occurs nowhere else (the token cache sees to that), so boundaries are read off the
tokens themselves. Pure numpy.
"""

import numpy as np

from llm_jax import errors
from llm_jax.data import batch as batch_lib
from llm_jax.data import token_cache

PACKED = "packed"
CONCAT = "concat"


def num_windows(num_tokens: int, length: int) -> int:
    """Returns how many windows of `length` inputs a stream of `num_tokens` gives."""
    return max(0, -(-(num_tokens - 1) // length))


def windows(
    cache: token_cache.TokenCache, indices: np.ndarray, *, length: int, packing: str
) -> batch_lib.Batch:
    """Reads windows into a batch.

    Args:
      cache: the token stream.
      indices: [B], the window of each row; -1 for a row of padding.
      length: T, inputs of a window.
      packing: "packed" restarts segments and positions at each document and drops the target that
        belongs to the next document; "concat" treats the stream as one text.

    Returns:
      A batch of numpy arrays, [B, T].

    Raises:
      errors.UserError: an unknown packing.
      IndexError: a window that the stream does not have.
    """
    if packing not in (PACKED, CONCAT):
        hint = errors.nearest(packing, (PACKED, CONCAT))
        raise errors.UserError(f"packing {packing!r} is not known: use packed or concat{hint}")
    count = num_windows(cache.num_tokens, length)
    if np.any(indices >= count) or np.any(indices < -1):
        raise IndexError(f"windows {indices} of {count}")

    stream, num_inputs = _read(cache, indices, length)
    tokens = stream[:, :-1].copy()
    offsets = np.arange(length, dtype=np.int32)
    is_input = offsets < num_inputs
    # The last token of the stream is a target only; as an input of the padding it must not show.
    tokens[~is_input] = cache.pad_id
    if packing == CONCAT:
        segments = is_input.astype(np.int32)
        positions = np.where(is_input, offsets, 0).astype(np.int32)
        return batch_lib.Batch(
            tokens, stream[:, 1:].copy(), is_input.astype(np.float32), segments, positions
        )

    is_end = tokens == cache.eos_id
    is_start = np.zeros_like(is_end)
    is_start[:, 1:] = is_end[:, :-1]
    segments = np.where(is_input, 1 + np.cumsum(is_start, axis=1, dtype=np.int32), 0)
    starts = np.maximum.accumulate(np.where(is_start, offsets, 0), axis=1)
    positions = np.where(is_input, offsets - starts, 0)
    weights = (is_input & ~is_end).astype(np.float32)
    return batch_lib.Batch(
        tokens,
        stream[:, 1:].copy(),
        weights,
        segments.astype(np.int32),
        positions.astype(np.int32),
    )


def _read(
    cache: token_cache.TokenCache, indices: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of windows, [B, T + 1], padded, and how many are inputs, [B, 1]."""
    stream = np.full((len(indices), length + 1), cache.pad_id, np.int32)
    num_inputs = np.zeros((len(indices), 1), np.int32)
    for row, index in enumerate(indices):
        if index >= 0:
            # A slice of the memory map a row: it reads pages in order, and converts as it copies.
            part = cache.tokens[index * length : index * length + length + 1]
            stream[row, : len(part)] = part
            num_inputs[row] = len(part) - 1
    return stream, num_inputs
