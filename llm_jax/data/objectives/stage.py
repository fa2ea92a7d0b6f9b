"""What a stage is: the items of a split, and a pure function from some of them to a batch."""

import abc

import numpy as np

from llm_jax import config as config_lib
from llm_jax.data import batch as batch_lib
from llm_jax.data import packing
from llm_jax.data import token_cache
from llm_jax.data.objectives import draws as draws_lib


class Stage(abc.ABC):
    """Makes batches of one objective.

    Attributes:
      num_items: rows of an epoch; items are numbered by them.
      name: of the split, for messages.
    """

    num_items: int
    name: str

    @abc.abstractmethod
    def __call__(
        self, items: np.ndarray, rows: np.ndarray, draws: draws_lib.Draws
    ) -> batch_lib.Batch:
        """Returns a batch of numpy arrays, pure in its arguments and each row in its own alone.

        Args:
          items: int64 [B], what each row holds, in [0, num_items); -1 for a row of padding.
          rows: int64 [B], numbers that the randomness of rows follows from.
          draws: the randomness.
        """


class TextStage(Stage):
    """A stage whose items are windows of a stream of tokens."""

    def __init__(self, config: config_lib.RunConfig, cache: token_cache.TokenCache):
        self._cache = cache
        self._length = config.data.sequence_length
        self._packing = config.data.packing
        self.name = f"split {cache.manifest.split!r} of {cache.manifest.source}"

    def _windows(self, items: np.ndarray) -> batch_lib.Batch:
        """Returns windows of inputs and the tokens that follow them, [B, T]."""
        return packing.windows(self._cache, items, length=self._length, packing=self._packing)

    def _texts(self, items: np.ndarray, length: int) -> packing.Text:
        """Returns windows of tokens that are to be predicted where they stand, [B, length]."""
        return packing.texts(self._cache, items, length=length, packing=self._packing)
