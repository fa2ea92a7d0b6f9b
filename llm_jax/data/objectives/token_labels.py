"""Labels of words, at the first token of each (Devlin et al. 2019, section 5.3); examples share rows."""

import numpy as np

from llm_jax.data import batch as batch_lib
from llm_jax.data import examples as columns
from llm_jax.data.objectives import examples as examples_lib
from llm_jax.data.objectives import rows as rows_lib


class TokenLabels(examples_lib.ExampleStage):
    """Examples with a label for each word; weights are 0 where a token has none."""

    is_packable = True

    def _batch(self, examples: np.ndarray, parts: rows_lib.Parts) -> batch_lib.Batch:
        batch, placed = self._texts(examples, parts)
        none = [columns.NO_LABEL]
        pieces = []
        for example in examples.tolist():
            kept = self._cache.target[example][: self._kept[0][example]]
            pieces += [none * len(self._first), kept, none]
        targets = np.full(batch.tokens.shape, columns.NO_LABEL, np.int32)
        targets[placed.index] = examples_lib.concatenated(pieces)
        is_labelled = targets != columns.NO_LABEL
        return batch._replace(
            targets=np.where(is_labelled, targets, np.int32(0)),
            weights=is_labelled.astype(np.float32),
        )
