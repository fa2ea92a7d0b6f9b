"""Answers as spans of a context, after a question: one example a row (Devlin et al. 2019, section 4.2)."""

import numpy as np

from llm_jax import config as config_lib
from llm_jax.data import batch as batch_lib
from llm_jax.data import example_cache
from llm_jax.data import examples as columns
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data.objectives import examples as examples_lib
from llm_jax.data.objectives import rows as rows_lib


class Span(examples_lib.ExampleStage):
    """Examples whose target is the first and the last token of the answer in the row, [B, 2].

    Without an answer both are the row's cls (section 4.3), or its last token in a decoder. The end of a context that is too long is cut off; what that takes an answer from has no weight.
    """

    def __init__(
        self,
        config: config_lib.RunConfig,
        cache: example_cache.ExampleCache,
        tokenizer: tokenizer_lib.Tokenizer,
    ):
        super().__init__(config, cache, tokenizer)
        answers = np.asarray(cache.target.values, np.int64).reshape(-1, 2)
        start = self.second_starts()
        last = start + self._kept[1]  # the sep behind the context
        none = np.zeros_like(last) if self._is_encoder else last
        has_answer = answers[:, 0] != columns.NO_LABEL
        self._targets = np.where(has_answer[:, None], start[:, None] + answers, none[:, None])
        self._is_whole = answers[:, 1] < self._kept[1]
        if not self._is_whole.all():
            count = f"{np.sum(~self._is_whole):,} of the {len(last):,} examples in {self.name}"
            examples_lib.log.warning("%s have their answer cut off and do not count", count)

    def second_starts(self) -> np.ndarray:
        """Returns where the context of each example begins in its row, int64 [N]."""
        return len(self._first) + self._kept[0] + 1

    def _fit_inputs(self, lengths: list[np.ndarray], room: np.ndarray | int) -> list[np.ndarray]:
        """Cuts the context; the question only where it is longer than half of the row."""
        question, context = lengths
        is_long = question + context > room
        question = np.where(is_long, np.minimum(question, room // 2), question)
        return [question, np.minimum(context, room - question)]

    def _batch(self, examples: np.ndarray, parts: rows_lib.Parts) -> batch_lib.Batch:
        batch, _ = self._texts(examples, parts)
        is_whole = self._is_whole[examples]
        targets = np.zeros((parts.num_rows, 2), np.int32)
        targets[parts.rows] = np.where(is_whole[:, None], self._targets[examples], 0)
        weights = np.zeros(parts.num_rows, np.float32)
        weights[parts.rows] = is_whole
        return batch._replace(targets=targets, weights=weights)
