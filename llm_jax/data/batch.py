"""The batch that the data pipeline hands to a training or evaluation step."""

from typing import Any
from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of tokens with their targets; a pytree, so that it passes through `jax.jit`.

    Fields are [B, T], but for those of an encoder-decoder's encoder, [B, S], and for labels of whole
    rows: targets of a sequence are [B] (int32, float32 in a regression), those of a span [B, 2] (its
    first and last token); their weights are [B], and those of pairs, whose targets nobody reads. They are numpy from the pipeline, `jax.Array` once
    they are on the mesh, and None where a model does not take them.
    """

    tokens: Any  # int32: inputs, of the decoder where there is an encoder beside it
    targets: Any  # int32: the token to predict at each input; labels
    weights: Any  # float32: 1 where the target counts in the loss, else 0
    segments: Any  # int32: documents or examples of a row, counted from 1; 0 is padding
    positions: Any  # int32: of each token within its segment, from 0
    token_types: Any = None  # int32: which text of an example a token is of
    prefix: Any = None  # bool: tokens that see each other both ways
    encoder_tokens: Any = None  # int32
    encoder_segments: Any = None  # int32: a segment of the decoder sees the one of its number
    encoder_positions: Any = None  # int32
    reference: Any = (
        None  # float32 [B, 2]: log-probabilities of two answers, by the model of the start
    )


# What a model's `hidden` calls the fields that not every batch has.
_ARGUMENTS = {
    "token_types": "token_types_BT",
    "prefix": "prefix_BT",
    "encoder_tokens": "encoder_tokens_BS",
    "encoder_segments": "encoder_segments_BS",
    "encoder_positions": "encoder_positions_BS",
}


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Returns the arguments of a model's `hidden` beside tokens, positions and segments."""
    fields = batch._asdict()
    return {name: fields[field] for field, name in _ARGUMENTS.items() if fields[field] is not None}


def empty(rows: int, length: int, pad_id: int) -> Batch:
    """Returns a batch of padding, [rows, length] each: it has no weight anywhere."""
    shape = (rows, length)
    return Batch(
        tokens=np.full(shape, pad_id, np.int32),
        targets=np.full(shape, pad_id, np.int32),
        weights=np.zeros(shape, np.float32),
        segments=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
    )
