"""What objectives of examples share: how texts become inputs, what is cut off, which row has what.

An encoder reads [cls] text [sep], or [cls] text [sep] text [sep], where the second text and its sep have
token type 1. Other models have their eos in place of sep, and their bos, if any, in place of cls. An example that is too long
loses tokens from the end of its longer text, until they are equal and then of both.
"""

import abc
import logging

import numpy as np

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.data import batch as batch_lib
from llm_jax.data import example_cache
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data.objectives import draws as draws_lib
from llm_jax.data.objectives import plan
from llm_jax.data.objectives import rows as rows_lib
from llm_jax.data.objectives import stage

log = logging.getLogger(__name__)


def fit(first: np.ndarray, second: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lengths of two texts that are cut to fit together, int64 [N] each.

    The longer text loses tokens until they are equal, then both do (as BERT's `truncate_seq_pair`).
    """
    is_shorter = first <= second
    shorter = np.minimum(np.minimum(first, second), room // 2)
    longer = np.minimum(np.maximum(first, second), room - shorter)
    return np.where(is_shorter, shorter, longer), np.where(is_shorter, longer, shorter)


class ExampleStage(stage.Stage):
    """A stage whose items are rows of examples: those of a plan if they are packed, else one each."""

    is_packable = False

    def __init__(
        self,
        config: config_lib.RunConfig,
        cache: example_cache.ExampleCache,
        tokenizer: tokenizer_lib.Tokenizer,
    ):
        self._config, self._cache = config, cache
        self._length = config.data.sequence_length
        self.name = f"split {cache.manifest.split!r} of {cache.manifest.source}"
        self._is_encoder = config.model.architecture == "encoder"
        first = tokenizer.cls_id if self._is_encoder else tokenizer.bos_id
        self._first = [] if first is None else [first]
        self._sep = tokenizer.sep_id if self._is_encoder else cache.eos_id
        self._num_special = len(self._first) + len(cache.inputs)
        self._full = [column.lengths for column in cache.inputs]
        self._kept = self._fitted()
        self._tell_of_long_ones()
        self._offsets, self._order = self._planned()
        self.num_items = len(self._offsets) - 1

    # --- what fits ------------------------------------------------------------------------------

    def _fitted(self) -> list[np.ndarray]:
        """Returns how many tokens are kept of each column of inputs, int64 [N] each."""
        room = self._length - self._num_special
        if room < 1:
            raise errors.UserError(
                f"data.sequence_length = {self._length} has no room for text beside"
                f" {self._num_special} special tokens"
            )
        return self._fit_inputs(self._full, room)

    def _fit_inputs(self, lengths: list[np.ndarray], room: np.ndarray | int) -> list[np.ndarray]:
        if len(lengths) == 1:
            return [np.minimum(lengths[0], room)]
        return list(fit(*lengths, room))

    def _row_lengths(self) -> np.ndarray:
        """Returns the tokens that each example has in each sequence of a row, int64 [N, K]."""
        return (sum(self._kept) + self._num_special)[:, None]

    def _capacities(self) -> tuple[int, ...]:
        return (self._length,)

    def _is_cut(self) -> np.ndarray:
        """Returns which examples are too long, bool [N]."""
        return np.any([a < b for a, b in zip(self._kept, self._full, strict=True)], axis=0)

    def _tell_of_long_ones(self) -> None:
        is_cut = self._is_cut()
        if not is_cut.any():
            return
        limits = f"data.sequence_length = {self._length}"
        if len(self._capacities()) > 1:
            limits += f" and objective.target_length = {self._capacities()[1]}"
        count = f"{is_cut.sum():,} of the {len(is_cut):,} examples in {self.name}"
        if self._config.data.too_long == "refuse":
            raise errors.UserError(
                f"{count} are longer than {limits}, the first of them is number"
                f" {int(np.argmax(is_cut)) + 1}: raise the length, or set data.too_long='truncate'"
            )
        log.warning("%s are longer than %s: their ends are cut off", count, limits)

    # --- which row has what ---------------------------------------------------------------------

    def _planned(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns where each row begins among the examples in the order of rows, and that order."""
        count = self._cache.num_examples
        if not (self.is_packable and self._config.data.packing == "packed"):
            return np.arange(count + 1), np.arange(count)
        rows = plan.first_fit(self._row_lengths(), self._capacities())
        sizes = np.bincount(rows)
        return np.cumsum([0, *sizes]), np.argsort(rows, kind="stable")

    def __call__(
        self, items: np.ndarray, rows: np.ndarray, draws: draws_lib.Draws
    ) -> batch_lib.Batch:
        del rows, draws  # nothing is random
        of_rows = [
            self._order[self._offsets[item] : self._offsets[item + 1]] if item >= 0 else []
            for item in items
        ]
        examples = np.concatenate([*of_rows, []]).astype(np.int64)
        owners = np.repeat(np.arange(len(items)), [len(mine) for mine in of_rows])
        return self._batch(examples, rows_lib.Parts(owners, len(items)))

    @abc.abstractmethod
    def _batch(self, examples: np.ndarray, parts: rows_lib.Parts) -> batch_lib.Batch:
        """Returns the batch of examples, of which `parts` says in which row each is."""

    def _inputs(self, examples: np.ndarray) -> rows_lib.Ragged:
        """Returns the inputs of examples, special tokens included."""
        pieces = []
        for example in examples.tolist():
            pieces.append(self._first)
            for column, kept in zip(self._cache.inputs, self._kept, strict=True):
                pieces += [column[example][: kept[example]], [self._sep]]
        lengths = sum(kept[examples] for kept in self._kept) + self._num_special
        return rows_lib.Ragged(concatenated(pieces), lengths)

    def _token_types(self, placed: rows_lib.Placed, examples: np.ndarray) -> np.ndarray | None:
        """Returns which text each token is of, int32 [B, T], for models that are told."""
        if not self._config.model.num_token_types:
            return None
        types = np.zeros(placed.tokens.shape, np.int32)
        if len(self._kept) == 2:
            first = len(self._first) + self._kept[0][examples] + 1
            lengths = first + self._kept[1][examples] + 1
            positions = placed.positions[placed.index]
            types[placed.index] = positions >= np.repeat(first, lengths)
        return types

    def _texts(
        self, examples: np.ndarray, parts: rows_lib.Parts
    ) -> tuple[batch_lib.Batch, rows_lib.Placed]:
        """Returns a batch without targets, [B, T], and where its tokens are."""
        placed = rows_lib.place(self._inputs(examples), parts, self._length, self._cache.pad_id)
        batch = batch_lib.Batch(
            tokens=placed.tokens,
            targets=None,
            weights=None,
            segments=placed.segments,
            positions=placed.positions,
            token_types=self._token_types(placed, examples),
        )
        return batch, placed


def concatenated(pieces: list) -> np.ndarray:
    """Returns lists and arrays of whole numbers as one array, int32."""
    return np.concatenate([*pieces, []]).astype(np.int32)
