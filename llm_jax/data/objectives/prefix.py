"""Prefix language modelling: the beginning is given, and its tokens see each other both ways.

Liu et al. 2018 (Generating Wikipedia), Raffel et al. 2020 (T5, section 3.2.1).
"""

import numpy as np

from llm_jax import config as config_lib
from llm_jax.data import batch as batch_lib
from llm_jax.data import packing
from llm_jax.data import token_cache
from llm_jax.data.objectives import causal
from llm_jax.data.objectives import draws as draws_lib


class Prefix(causal.Causal):
    """Windows of which a beginning is given, of each document that has a part in the window.

    The last token of a prefix predicts the first behind it; those before it have their targets
    within the prefix, which they see, so those do not count.
    """

    def __init__(self, config: config_lib.RunConfig, cache: token_cache.TokenCache):
        super().__init__(config, cache)
        self._min, self._max = config.objective.min_prefix, config.objective.max_prefix

    def __call__(
        self, items: np.ndarray, rows: np.ndarray, draws: draws_lib.Draws
    ) -> batch_lib.Batch:
        batch = self._windows(items)
        lengths = packing.segment_lengths(batch.segments)  # [B, 1 + segments]; 0 is padding
        uniform = draws.uniform(rows, lengths.shape[1])
        shares = self._min + (self._max - self._min) * uniform
        # One of 0 ... n, all of them as likely if the shares go from 0 to 1.
        prefixes = np.minimum((shares * (lengths + 1)).astype(np.int32), lengths)
        prefixes[:, 0] = 0
        prefix_BT = np.take_along_axis(prefixes, batch.segments, axis=1)
        is_seen = batch.positions + 1 < prefix_BT
        return batch._replace(
            weights=np.where(is_seen, np.float32(0.0), batch.weights),
            prefix=batch.positions < prefix_BT,
        )
