"""Labels of sequences, or numbers (regression): one example a row."""

import numpy as np

from llm_jax.data import batch as batch_lib
from llm_jax.data.objectives import examples as examples_lib
from llm_jax.data.objectives import rows as rows_lib


class Sequence(examples_lib.ExampleStage):
    """Examples whose target is a number: int32 of a label, float32 in a regression; [B]."""

    def _batch(self, examples: np.ndarray, parts: rows_lib.Parts) -> batch_lib.Batch:
        batch, _ = self._texts(examples, parts)
        values = self._cache.target.values
        targets = np.zeros(parts.num_rows, values.dtype.newbyteorder("="))
        targets[parts.rows] = values[examples]  # one of each example
        weights = np.zeros(parts.num_rows, np.float32)
        weights[parts.rows] = 1.0
        return batch._replace(targets=targets, weights=weights)
