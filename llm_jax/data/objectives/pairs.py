"""Pairs of texts that belong together, for a contrastive loss: a question and what answers it.

A row holds both, as two segments that do not see each other: [cls] first [sep], [cls] second [sep].
"""

import numpy as np

from llm_jax.data import batch as batch_lib
from llm_jax.data.objectives import examples as examples_lib
from llm_jax.data.objectives import rows as rows_lib


class Pairs(examples_lib.ExampleStage):
    """Examples of one text and the text that belongs to it; what is right follows from the row."""

    def _fitted(self) -> list[np.ndarray]:
        self._full = [self._cache.inputs[0].lengths, self._cache.target.lengths]
        self._num_special *= 2
        return super()._fitted()

    def _batch(self, examples: np.ndarray, parts: rows_lib.Parts) -> batch_lib.Batch:
        pieces = []
        for example in examples.tolist():
            for column, kept in zip(
                (self._cache.inputs[0], self._cache.target), self._kept, strict=True
            ):
                pieces += [self._first, column[example][: kept[example]], [self._sep]]
        lengths = np.stack([kept[examples] for kept in self._kept], axis=1).ravel()
        texts = rows_lib.Ragged(examples_lib.concatenated(pieces), lengths + self._num_special // 2)
        both = rows_lib.Parts(np.repeat(parts.rows, 2), parts.num_rows)
        placed = rows_lib.place(texts, both, self._length, self._cache.pad_id)
        weights = np.zeros(parts.num_rows, np.float32)
        weights[parts.rows] = 1.0
        has_types = bool(self._config.model.num_token_types)
        return batch_lib.Batch(
            tokens=placed.tokens,
            targets=np.arange(parts.num_rows, dtype=np.int32),
            weights=weights,
            segments=placed.segments,
            positions=placed.positions,
            token_types=np.zeros(placed.tokens.shape, np.int32) if has_types else None,
        )
