"""Rows of parts that have inputs and targets: for an encoder-decoder, or one after the other.

A part is a document's share of a window, or an example. Its tokens carry its number within the row
as their segment, in the encoder and in the decoder. What parts hold is ragged: all tokens in one
array, part after part, with the number of tokens of each.
"""

from typing import NamedTuple

import numpy as np

from llm_jax.data import batch as batch_lib


class Ragged(NamedTuple):
    """Tokens of parts, one part after the other."""

    tokens: np.ndarray  # int32 [sum of lengths]
    lengths: np.ndarray  # int64 [P]

    @property
    def owners(self) -> np.ndarray:
        """The part of each token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def positions(self) -> np.ndarray:
        """The place of each token in its part."""
        starts = np.cumsum(self.lengths) - self.lengths
        return np.arange(len(self.tokens)) - np.repeat(starts, self.lengths)


class Parts(NamedTuple):
    """Which row each part is in. Rows ascend."""

    rows: np.ndarray  # int64 [P]
    num_rows: int

    @property
    def numbers(self) -> np.ndarray:
        """The segment of each part, from 1 in each row."""
        return 1 + np.arange(len(self.rows)) - np.searchsorted(self.rows, self.rows)


def joined(first: Ragged, second: Ragged) -> Ragged:
    """Returns parts that have the tokens of the first and then those of the second."""
    ends = np.cumsum(first.lengths)
    tokens = np.insert(first.tokens, np.repeat(ends, second.lengths), second.tokens)
    return Ragged(tokens, first.lengths + second.lengths)


def with_token(
    parts: Ragged, token: np.ndarray | int, *, at_start: bool, which: np.ndarray
) -> Ragged:
    """Returns the parts with one more token at the start or the end of those in `which`, bool [P].

    The token is the same for all, or each part's own, [P].
    """
    ends = np.cumsum(parts.lengths)
    places = (ends - parts.lengths if at_start else ends)[which]
    # Of parts without tokens several places are the same: they are filled in order.
    new = np.broadcast_to(np.asarray(token, np.int32), which.shape)[which]
    tokens = np.insert(parts.tokens, places, new)
    return Ragged(tokens, parts.lengths + which)


class Placed(NamedTuple):
    """Parts in rows, [B, length]."""

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    index: tuple[np.ndarray, np.ndarray]  # where each ragged token is


def place(ragged: Ragged, parts: Parts, length: int, pad_id: int) -> Placed:
    """Puts parts side by side into their rows.

    Raises:
      ValueError: a row does not hold its parts.
    """
    ends = np.cumsum(ragged.lengths)
    row_starts = (ends - ragged.lengths)[np.searchsorted(parts.rows, parts.rows)]
    starts = ends - ragged.lengths - row_starts
    if np.any(starts + ragged.lengths > length):
        raise ValueError(f"rows of {length} do not hold {(starts + ragged.lengths).max()} tokens")
    owners, positions = ragged.owners, ragged.positions
    index = (parts.rows[owners], starts[owners] + positions)
    shape = (parts.num_rows, length)
    tokens = np.full(shape, pad_id, np.int32)
    segments, places = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    tokens[index] = ragged.tokens
    segments[index] = parts.numbers[owners]
    places[index] = positions
    return Placed(tokens, segments, places, index)


def encoder_decoder(
    inputs: Ragged,
    targets: Ragged,
    parts: Parts,
    lengths: tuple[int, int],
    start_id: int,
    pad_id: int,
) -> batch_lib.Batch:
    """Returns a batch for an encoder-decoder.

    Args:
      inputs, targets: of each part.
      parts: where they are.
      lengths: of an encoder's row and of a decoder's.
      start_id: what a decoder reads first in each part; then it reads its targets.
      pad_id: fills up.
    """
    encoder = place(inputs, parts, lengths[0], pad_id)
    decoder = place(targets, parts, lengths[1], pad_id)
    tokens = np.full(decoder.tokens.shape, pad_id, np.int32)
    tokens[:, 1:] = decoder.tokens[:, :-1]
    is_token = decoder.segments > 0
    tokens = np.where(is_token & (decoder.positions == 0), np.int32(start_id), tokens)
    return batch_lib.Batch(
        tokens=np.where(is_token, tokens, np.int32(pad_id)),
        targets=decoder.tokens,
        weights=is_token.astype(np.float32),
        segments=decoder.segments,
        positions=decoder.positions,
        encoder_tokens=encoder.tokens,
        encoder_segments=encoder.segments,
        encoder_positions=encoder.positions,
    )


def decoder(
    inputs: Ragged, targets: Ragged, parts: Parts, length: int, pad_id: int, has_prefix: bool
) -> batch_lib.Batch:
    """Returns a batch for a decoder, which reads the inputs of a part and then its targets.

    Args:
      length: of a row.
      has_prefix: whether inputs are told to be a prefix, whose tokens see each other both ways.
      others: as of `encoder_decoder`.

    The last input predicts the first target. What follows the last target is not predicted.
    """
    placed = place(joined(inputs, targets), parts, length, pad_id)
    next_tokens = np.full(placed.tokens.shape, pad_id, np.int32)
    next_tokens[:, :-1] = placed.tokens[:, 1:]
    num_inputs, num_all = (np.zeros(placed.tokens.shape, np.int64) for _ in range(2))
    owners = np.repeat(np.arange(len(parts.rows)), inputs.lengths + targets.lengths)
    num_inputs[placed.index] = inputs.lengths[owners]
    num_all[placed.index] = (inputs.lengths + targets.lengths)[owners]
    is_predicting = (placed.positions >= num_inputs - 1) & (placed.positions < num_all - 1)
    return batch_lib.Batch(
        tokens=placed.tokens,
        targets=next_tokens,
        weights=is_predicting.astype(np.float32),
        segments=placed.segments,
        positions=placed.positions,
        prefix=placed.positions < num_inputs if has_prefix else None,
    )
