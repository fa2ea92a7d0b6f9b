"""The batch that the data pipeline hands to a training or evaluation step."""

from typing import Any
from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of tokens with their targets; a pytree, so that it passes through `jax.jit`.

    Every field is [B, T]: numpy from the pipeline, `jax.Array` once it is on the mesh.
    """

    tokens: Any  # int32: inputs
    targets: Any  # int32: the token that follows each input
    weights: Any  # float32: 1 where the target counts in the loss, else 0
    segments: Any  # int32: documents of a row, counted from 1; 0 is padding
    positions: Any  # int32: of each token within its document's part of this row, from 0


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
