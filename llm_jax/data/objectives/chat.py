"""Conversations: a decoder reads all of one and learns the assistant's messages alone."""

import numpy as np

from llm_jax.data import batch as batch_lib
from llm_jax.data.objectives import examples as examples_lib
from llm_jax.data.objectives import rows as rows_lib


class Chat(examples_lib.ExampleStage):
    """Rows of conversations, each of which sees itself alone; one that is too long loses its end."""

    is_packable = True

    def _fitted(self) -> list[np.ndarray]:
        # Templates write special tokens themselves.
        self._first, self._num_special = [], 0
        return super()._fitted()

    def _batch(self, examples: np.ndarray, parts: rows_lib.Parts) -> batch_lib.Batch:
        (column,), (kept,) = self._cache.inputs, self._kept
        lengths = kept[examples]
        texts, answers = (
            examples_lib.concatenated([of[one][: kept[one]] for one in examples.tolist()])
            for of in (column, self._cache.target)
        )
        ragged = rows_lib.Ragged(texts, lengths)
        placed = rows_lib.place(ragged, parts, self._length, self._cache.pad_id)
        is_answer = np.zeros(placed.tokens.shape, np.float32)
        # What begins a conversation is predicted by nothing before it.
        is_answer[placed.index] = answers * (ragged.positions > 0)
        return batch_lib.Batch(
            tokens=placed.tokens,
            targets=_next(placed.tokens, self._cache.pad_id),
            weights=_next(is_answer, 0),
            segments=placed.segments,
            positions=placed.positions,
        )


def _next(rows: np.ndarray, last: int) -> np.ndarray:
    """Returns what stands one further on in each row, [B, T]."""
    found = np.full_like(rows, last)
    found[:, :-1] = rows[:, 1:]
    return found
