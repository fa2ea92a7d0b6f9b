"""Span corruption of Raffel et al. 2020 (T5): spans are taken out, and to be given back in order.

Each document's part of a window is a text of its own: its inputs are its tokens with a sentinel for
each span, its targets the sentinels, each with its span behind it. The last text of a window, whose
document mostly goes on in the next one, has T5's eos at the end of both; the others end with the eos
of their document, which is in their last span. A decoder reads inputs and targets in one row.
"""

import dataclasses
import logging

import numpy as np

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.data import batch as batch_lib
from llm_jax.data import packing
from llm_jax.data import token_cache
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data.objectives import draws as draws_lib
from llm_jax.data.objectives import rows as rows_lib
from llm_jax.data.objectives import spans
from llm_jax.data.objectives import stage

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Noise:
    """What is taken out of a window.

    Attributes:
      density: share of tokens.
      mean_length: of spans, in tokens; infinite: one span, the end of each text.
      mark: id of a token before the inputs of each text, -1 for none.
    """

    density: float
    mean_length: float
    mark: int = -1


def window_length(config: config_lib.RunConfig, noise: Noise) -> int:
    """Returns how many tokens of text fill the rows of a model, or 1 if even two are too many.

    An encoder-decoder whose target length is that of T5's arithmetic is filled to the last token, a
    decoder but for two.
    """
    lengths = np.arange(2, config.data.sequence_length + config.objective.target_length + 2)
    num_noise, num_spans = spans.counts(lengths, noise.density, noise.mean_length)
    num_inputs, num_targets = _row_lengths(config, lengths, num_noise, num_spans, noise.mark >= 0)
    fits = _overflow(config, num_inputs, num_targets) <= 0
    return 1 + int(np.argmin(fits))


def _row_lengths(
    config: config_lib.RunConfig,
    num_tokens: np.ndarray,
    num_noise: np.ndarray,
    num_spans: np.ndarray,
    num_marks: np.ndarray | int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the inputs and targets that texts become, as T5's `random_spans_helper`."""
    has_eos = config.model.architecture == "encoder_decoder"  # a decoder goes on with targets
    num_inputs = num_tokens - num_noise + num_spans + num_marks + has_eos
    return num_inputs, num_noise + num_spans + 1


def _overflow(
    config: config_lib.RunConfig, num_inputs: np.ndarray, num_targets: np.ndarray
) -> np.ndarray:
    """Returns how many tokens too many rows have; below 0, how many they lack."""
    length = config.data.sequence_length
    if config.model.architecture == "encoder_decoder":
        too_many = num_targets - config.objective.target_length
        return np.maximum(num_inputs - length, too_many)
    return num_inputs + num_targets - length


class SpanCorruption(stage.TextStage):
    """Windows of documents with spans taken out, as inputs and targets."""

    def __init__(
        self,
        config: config_lib.RunConfig,
        cache: token_cache.TokenCache,
        tokenizer: tokenizer_lib.Tokenizer,
    ):
        """Raises UserError for rows that hold no text, or too few sentinels for theirs."""
        super().__init__(config, cache)
        self._config = config
        self._noises = self._make_noises(tokenizer)
        self._densities = np.array([noise.density for noise in self._noises])
        self._mean_lengths = np.array([noise.mean_length for noise in self._noises])
        self._marks = np.array([noise.mark for noise in self._noises], np.int32)
        self._sentinels = np.array(tokenizer.sentinel_ids, np.int32)
        self._window = min(window_length(config, noise) for noise in self._noises)
        self._check_lengths()
        self.num_items = packing.num_texts(cache.num_tokens, self._window)

    def _make_noises(self, tokenizer: tokenizer_lib.Tokenizer) -> list[Noise]:
        del tokenizer
        objective = self._config.objective
        return [Noise(objective.noise_density, objective.mean_span_length)]

    def _check_lengths(self) -> None:
        lengths = f"data.sequence_length = {self._length}"
        if self._config.model.architecture == "encoder_decoder":
            lengths += f" and objective.target_length = {self._config.objective.target_length}"
        if self._window < 2:
            raise errors.UserError(f"{lengths} hold no text with a span taken out: give more")
        _, num_spans = spans.counts(self._window, self._densities, self._mean_lengths)
        if num_spans.max() > len(self._sentinels):
            raise errors.UserError(
                f"{lengths} take texts of {self._window} tokens with {num_spans.max()} spans, but"
                f" there are {len(self._sentinels)} sentinels: set objective.num_sentinels ="
                f" {num_spans.max()} (of a tokenizer without its own), longer spans or shorter rows"
            )

    def kinds(self, rows: np.ndarray, draws: draws_lib.Draws) -> np.ndarray:
        """Returns which kind of noise each row has, int64 [B]."""
        del draws
        return np.zeros(len(rows), np.int64)

    def __call__(
        self, items: np.ndarray, rows: np.ndarray, draws: draws_lib.Draws
    ) -> batch_lib.Batch:
        text = self._texts(items, self._window)
        kinds = self.kinds(rows, draws)
        uniform = draws.uniform(rows, 2, stream=1)
        is_kept, parts, lengths, num_noise, num_spans = self._planned(text, kinds, uniform)
        tokens = text.tokens[is_kept]
        at_tokens = draws.uniform(rows, self._window, stream=2)[is_kept]
        is_noise = spans.random_spans(lengths, num_noise, num_spans, at_tokens)
        inputs, targets = _taken_out(tokens, lengths, is_noise, num_spans, self._sentinels)
        # The last text of a row goes on in the next one, unless an eos is its last token.
        is_open = tokens[np.cumsum(lengths) - 1] != self._cache.eos_id
        return self._batch(inputs, targets, parts, is_open, kinds)

    def _planned(
        self, text: packing.Text, kinds: np.ndarray, uniform: np.ndarray
    ) -> tuple[np.ndarray, rows_lib.Parts, np.ndarray, np.ndarray, np.ndarray]:
        """Decides what is kept of windows, and how much of each text is noise.

        All of a window is kept, unless it has so many documents that their marks, or too few spans
        for their shortness, make its row too long: then it loses its last tokens.

        Returns:
          Which tokens are kept, bool [B, T]; the texts, their lengths, noise and spans, [P].
        """
        lengths_BP = packing.segment_lengths(text.segments)[:, 1:]
        before_BP = np.cumsum(lengths_BP, axis=1) - lengths_BP
        num_tokens = lengths_BP.sum(axis=1).astype(np.int64)
        while True:
            kept_BP = np.clip(num_tokens[:, None] - before_BP, 0, lengths_BP)
            owners, _ = np.nonzero(kept_BP)
            lengths = kept_BP[kept_BP > 0].astype(np.int64)
            num_noise, num_spans = self._counts(num_tokens, lengths, owners, kinds, uniform)
            sums = [
                np.bincount(owners, values, minlength=len(kinds)).astype(np.int64)
                for values in (num_noise, num_spans, self._marks[kinds[owners]] >= 0)
            ]
            overflow = _overflow(self._config, *_row_lengths(self._config, num_tokens, *sums))
            overflow = np.where(num_tokens > 0, np.maximum(overflow, 0), 0)
            if not overflow.any():
                break
            num_tokens = np.maximum(num_tokens - overflow, 0)
        is_kept = np.arange(text.tokens.shape[1]) < num_tokens[:, None]
        return is_kept, rows_lib.Parts(owners, len(kinds)), lengths, num_noise, num_spans

    def _counts(
        self,
        num_tokens: np.ndarray,
        lengths: np.ndarray,
        owners: np.ndarray,
        kinds: np.ndarray,
        uniform: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the noise and the spans of each text, [P]; all of its kind's in a window."""
        totals = spans.counts(num_tokens, self._densities[kinds], self._mean_lengths[kinds])
        dealt = spans.apportion(lengths, owners, *totals, uniform)
        is_suffix = np.isinf(self._mean_lengths[kinds])[owners]
        if not is_suffix.any():
            return dealt
        suffixes = spans.counts(lengths, self._densities[kinds][owners], np.inf)
        num_noise, num_spans = (
            np.where(is_suffix, suffix, other)
            for suffix, other in zip(suffixes, dealt, strict=True)
        )
        return num_noise, num_spans

    def _batch(
        self,
        inputs: rows_lib.Ragged,
        targets: rows_lib.Ragged,
        parts: rows_lib.Parts,
        is_open: np.ndarray,
        kinds: np.ndarray,
    ) -> batch_lib.Batch:
        """Adds marks and eos, and puts texts into rows."""
        eos_id, pad_id = self._cache.eos_id, self._cache.pad_id
        marks = self._marks[kinds][parts.rows]
        inputs = rows_lib.with_token(inputs, marks, at_start=True, which=marks >= 0)
        targets = rows_lib.with_token(targets, eos_id, at_start=False, which=is_open)
        if self._config.model.architecture == "encoder_decoder":
            inputs = rows_lib.with_token(inputs, eos_id, at_start=False, which=is_open)
            lengths = self._length, self._config.objective.target_length
            start_id = self._config.model.decoder_start_id
            return rows_lib.encoder_decoder(inputs, targets, parts, lengths, start_id, pad_id)
        has_prefix = self._config.objective.is_input_bidirectional
        return rows_lib.decoder(inputs, targets, parts, self._length, pad_id, has_prefix)


def _taken_out(
    tokens: np.ndarray,
    lengths: np.ndarray,
    is_noise: np.ndarray,
    num_spans: np.ndarray,
    sentinels: np.ndarray,
) -> tuple[rows_lib.Ragged, rows_lib.Ragged]:
    """Returns the inputs and the targets of texts; arguments are ragged, or [P]."""
    owners = np.repeat(np.arange(len(lengths)), lengths)
    # A text begins with what is no noise, so none of its spans goes on from the text before.
    is_start = is_noise.copy()
    is_start[1:] &= ~is_noise[:-1]
    first_spans = np.cumsum(num_spans) - num_spans
    span_numbers = np.arange(num_spans.sum()) - np.repeat(first_spans, num_spans)
    span_sentinels = sentinels[span_numbers]

    with_sentinels = tokens.copy()
    with_sentinels[is_start] = span_sentinels
    is_input = ~is_noise | is_start
    num_inputs = np.bincount(owners[is_input], minlength=len(lengths))
    inputs = rows_lib.Ragged(with_sentinels[is_input], num_inputs)

    num_targets = np.bincount(owners[is_noise], minlength=len(lengths)) + num_spans
    starts = np.flatnonzero(is_start[is_noise])
    targets = np.insert(tokens[is_noise], starts, span_sentinels)
    return inputs, rows_lib.Ragged(targets, num_targets)
