"""Masked language modelling of Devlin et al. 2019 (BERT, section 3.1).

Tokens are chosen independently, anew in each epoch (Liu et al. 2019, RoBERTa, section 4.1). Of the
chosen 80% are hidden by the mask token, 10% are replaced by a random one and 10% stay as they are.
"""

import numpy as np

from llm_jax import config as config_lib
from llm_jax.data import batch as batch_lib
from llm_jax.data import packing
from llm_jax.data import token_cache
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data.objectives import draws as draws_lib
from llm_jax.data.objectives import stage

_HIDDEN, _REPLACED = 0.8, 0.1


class MaskedLM(stage.TextStage):
    """Windows of tokens, some of them hidden; each row begins with the tokenizer's cls.

    Targets are the tokens in their places. Special tokens are never chosen. With whole words, a word
    is chosen as one, with the rate that tokens have otherwise, so the share of tokens is the same.
    """

    def __init__(
        self,
        config: config_lib.RunConfig,
        cache: token_cache.TokenCache,
        tokenizer: tokenizer_lib.Tokenizer,
    ):
        super().__init__(config, cache)
        self._rate = config.objective.mask_rate
        self._is_by_word = config.objective.use_whole_words
        self._has_types = config.model.num_token_types > 0
        self._tokenizer = tokenizer
        self._ordinary_ids = np.flatnonzero(~tokenizer.is_special_V).astype(np.int32)
        self._length -= 1  # for cls
        self.num_items = packing.num_texts(cache.num_tokens, self._length)

    def __call__(
        self, items: np.ndarray, rows: np.ndarray, draws: draws_lib.Draws
    ) -> batch_lib.Batch:
        text = self._with_cls(self._texts(items, self._length))
        targets = text.tokens
        length = targets.shape[1]
        may_be_chosen = (text.segments > 0) & ~self._tokenizer.is_special_V[targets]
        choice = draws.uniform(rows, length, stream=0)
        if self._is_by_word:
            choice = self._of_words(choice, text, may_be_chosen)
        is_chosen = may_be_chosen & (choice < self._rate)
        fate = draws.uniform(rows, length, stream=1)
        tokens = np.where(is_chosen & (fate < _HIDDEN), self._tokenizer.mask_id, targets)
        is_replaced = is_chosen & (fate >= _HIDDEN) & (fate < _HIDDEN + _REPLACED)
        # What is known of a number between 0.8 and 0.9 is uniform again.
        share = (fate[is_replaced] - _HIDDEN) / _REPLACED
        last = len(self._ordinary_ids) - 1
        picked = np.clip((share * (last + 1)).astype(np.int64), 0, last)
        tokens[is_replaced] = self._ordinary_ids[picked]
        return batch_lib.Batch(
            tokens.astype(np.int32),
            targets,
            is_chosen.astype(np.float32),
            text.segments,
            text.positions,
            np.zeros_like(targets) if self._has_types else None,
        )

    def _with_cls(self, text: packing.Text) -> packing.Text:
        """Returns the rows behind a cls, which belongs to the first document in them."""
        is_first = text.segments == 1
        positions = text.positions + is_first
        segments = np.pad(text.segments, ((0, 0), (1, 0)), mode="edge")
        tokens = np.pad(text.tokens, ((0, 0), (1, 0)), constant_values=self._tokenizer.cls_id)
        tokens[segments[:, 0] == 0, 0] = self._cache.pad_id
        return packing.Text(tokens, segments, np.pad(positions, ((0, 0), (1, 0))))

    def _of_words(
        self, choice: np.ndarray, text: packing.Text, may_be_chosen: np.ndarray
    ) -> np.ndarray:
        """Returns for each token the number of the first token of its word."""
        starts = self._tokenizer.word_starts(text.tokens) | (text.positions == 0) | ~may_be_chosen
        firsts = np.where(starts, np.arange(starts.shape[1]), 0)
        return np.take_along_axis(choice, np.maximum.accumulate(firsts, axis=1), axis=1)
