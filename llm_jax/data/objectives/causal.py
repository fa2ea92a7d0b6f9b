"""Causal language modelling: each token from those before it."""

import numpy as np

from llm_jax import config as config_lib
from llm_jax.data import batch as batch_lib
from llm_jax.data import packing
from llm_jax.data import token_cache
from llm_jax.data.objectives import draws as draws_lib
from llm_jax.data.objectives import stage


class Causal(stage.TextStage):
    """Windows of inputs with the token that follows each."""

    def __init__(self, config: config_lib.RunConfig, cache: token_cache.TokenCache):
        super().__init__(config, cache)
        self.num_items = packing.num_windows(cache.num_tokens, self._length)

    def __call__(
        self, items: np.ndarray, rows: np.ndarray, draws: draws_lib.Draws
    ) -> batch_lib.Batch:
        del rows, draws  # nothing is random
        return self._windows(items)
