"""Sequence to sequence: a text to write for each text, or two, that is given.

Examples share rows, in an encoder, a decoder and between them (Krell et al. 2021), unless data.packing is
"none". A decoder alone reads inputs and targets one after the other, and its loss is on targets.
"""

import numpy as np

from llm_jax import config as config_lib
from llm_jax.data import batch as batch_lib
from llm_jax.data import example_cache
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data.objectives import examples as examples_lib
from llm_jax.data.objectives import rows as rows_lib


class Seq2Seq(examples_lib.ExampleStage):
    """Examples with a text as their target, which ends with eos."""

    is_packable = True

    def __init__(
        self,
        config: config_lib.RunConfig,
        cache: example_cache.ExampleCache,
        tokenizer: tokenizer_lib.Tokenizer,
    ):
        self._is_pair = config.model.architecture == "encoder_decoder"
        super().__init__(config, cache, tokenizer)

    def _fitted(self) -> list[np.ndarray]:
        targets = self._cache.target.lengths
        if self._is_pair:
            self._targets = np.minimum(targets, self._config.objective.target_length - 1)
            return super()._fitted()
        room = self._length - self._num_special - 1
        inputs, self._targets = examples_lib.fit(sum(self._full), targets, room)
        return self._fit_inputs(self._full, inputs)

    def _row_lengths(self) -> np.ndarray:
        inputs = sum(self._kept) + self._num_special
        if self._is_pair:
            return np.stack([inputs, self._targets + 1], axis=1)
        return (inputs + self._targets + 1)[:, None]

    def _capacities(self) -> tuple[int, ...]:
        target_length = self._config.objective.target_length
        return (self._length, target_length) if self._is_pair else (self._length,)

    def _is_cut(self) -> np.ndarray:
        return super()._is_cut() | (self._targets < self._cache.target.lengths)

    def _batch(self, examples: np.ndarray, parts: rows_lib.Parts) -> batch_lib.Batch:
        inputs = self._inputs(examples)
        lengths = self._targets[examples] + 1
        pieces = []
        for example in examples.tolist():
            text = self._cache.target[example][: self._targets[example]]
            pieces += [text, [self._cache.eos_id]]
        targets = rows_lib.Ragged(examples_lib.concatenated(pieces), lengths)
        pad_id = self._cache.pad_id
        if self._is_pair:
            start_id = self._config.model.decoder_start_id
            return rows_lib.encoder_decoder(
                inputs, targets, parts, self._capacities(), start_id, pad_id
            )
        has_prefix = self._config.objective.is_input_bidirectional
        return rows_lib.decoder(inputs, targets, parts, self._length, pad_id, has_prefix)
