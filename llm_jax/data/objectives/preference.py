"""Preferences: of what is asked, an answer that was preferred and one that was not.

A row holds both, as two segments that do not see each other: asked chosen, asked rejected.
"""

import numpy as np

from llm_jax import errors
from llm_jax.data import batch as batch_lib
from llm_jax.data.objectives import examples as examples_lib
from llm_jax.data.objectives import rows as rows_lib


class Preference(examples_lib.ExampleStage):
    """Rows of two answers; where they are too long what is asked loses its beginning, then they their ends."""

    def _fitted(self) -> list[np.ndarray]:
        self._first, self._num_special = [], 0
        answers = [self._cache.inputs[1].lengths, self._cache.target.lengths]
        self._full = [self._cache.inputs[0].lengths, *answers]
        if self._length < 4:
            raise errors.UserError(
                f"data.sequence_length = {self._length} has no room for two answers and what is asked"
            )
        fitted = examples_lib.fit(*answers, self._length - 2)
        room = (self._length - sum(fitted)) // 2
        return [np.minimum(self._full[0], room), *fitted]

    def _batch(self, examples: np.ndarray, parts: rows_lib.Parts) -> batch_lib.Batch:
        columns = (*self._cache.inputs, self._cache.target)
        asked, answers = [], []
        for one in examples.tolist():
            kept = [own[one] for own in self._kept]
            before = columns[0][one]
            asked += [before[len(before) - kept[0] :]] * 2
            answers += [columns[1][one][: kept[1]], columns[2][one][: kept[2]]]
        inputs, targets = (
            rows_lib.Ragged(examples_lib.concatenated(x), np.array([len(y) for y in x], np.int64))
            for x in (asked, answers)
        )
        both = rows_lib.Parts(np.repeat(parts.rows, 2), parts.num_rows)
        return rows_lib.decoder(inputs, targets, both, self._length, self._cache.pad_id, False)
