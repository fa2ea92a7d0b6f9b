"""What a model says of each example of a split, in the split's order, whatever the devices and hosts.

A batch lies over the mesh as in training; what is said of it is brought together on every host.
"""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as config_lib
from llm_jax import distributed
from llm_jax import train_step
from llm_jax.data import batch as batch_lib
from llm_jax.data import example_cache
from llm_jax.data import objectives
from llm_jax.data import packing
from llm_jax.data import pipeline
from llm_jax.data import placement
from llm_jax.data import token_cache
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.models import build

_LONGEST_ANSWER = 30  # tokens; BERT's (Devlin et al. 2019, section 4.2, by its code)


def batches(
    config: config_lib.RunConfig,
    cache: Any,
    tokenizer: tokenizer_lib.Tokenizer,
    mesh: jax.sharding.Mesh,
    rules: Any,
) -> Iterator[batch_lib.Batch]:
    """Yields the batches of a split, an example a row, in order; the last one is filled up with padding."""
    data = dataclasses.replace(config.data, packing="none")
    config = dataclasses.replace(config, data=data)
    stage = objectives.make(config, cache, tokenizer)
    place = jax.sharding.NamedSharding(mesh, rules.act("BT"))
    rows = placement.host_rows(place, (data.batch_size, data.sequence_length))
    host_batches = pipeline.eval_batches(stage, data, rows=rows)
    return placement.on_mesh(host_batches, place, data.batch_size, rows)


def labels(
    config: config_lib.RunConfig,
    model: build.Model,
    found: Iterator[batch_lib.Batch],
    num_examples: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns targets and predictions of sequences: labels int [N], or numbers float [N]."""
    is_regression = config.model.num_labels == 1

    def said(logits_BY: jax.Array) -> jax.Array:
        return logits_BY[:, 0] if is_regression else jnp.argmax(logits_BY, axis=-1)

    parts = _collected(config, model, found, lambda batch, logits: (batch.targets, said(logits)))
    targets, predictions = (np.concatenate(part)[:num_examples] for part in zip(*parts))
    return targets, predictions


def token_labels(
    config: config_lib.RunConfig,
    model: build.Model,
    found: Iterator[batch_lib.Batch],
    num_examples: int,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns of each example the targets and the predictions of its words, those that fit into the row."""

    def said(batch: batch_lib.Batch, logits_BTY: jax.Array) -> tuple[jax.Array, ...]:
        return batch.targets, jnp.argmax(logits_BTY, axis=-1), batch.weights

    parts = _collected(config, model, found, said)
    targets, predictions, weights = (np.concatenate(part)[:num_examples] for part in zip(*parts))
    rows = zip(targets, predictions, weights > 0, strict=True)
    both = [(wanted[is_word], found_of_row[is_word]) for wanted, found_of_row, is_word in rows]
    return [wanted for wanted, _ in both], [of_row for _, of_row in both]


def spans(
    config: config_lib.RunConfig,
    model: build.Model,
    found: Iterator[batch_lib.Batch],
    starts_N: np.ndarray,
) -> np.ndarray:
    """Returns the first and the last token of each answer in its context, int [N, 2]; -1 for none.

    The span with the highest sum of logits, of those that end after they begin; none where the sum for no
    answer is higher still.

    Args:
      config, model, found: as of the others.
      starts_N: where each row's context begins.
    """

    def said(batch: batch_lib.Batch, logits_BT2: jax.Array) -> tuple[jax.Array, ...]:
        return logits_BT2, batch.segments

    parts = _collected(config, model, found, said)
    logits, segments = (np.concatenate(part)[: len(starts_N)] for part in zip(*parts))
    is_encoder = config.model.architecture == "encoder"
    return np.array(
        [
            _best_span(logits_T2[: np.sum(segments_T > 0)], int(start), is_encoder)
            for logits_T2, segments_T, start in zip(logits, segments, starts_N, strict=True)
        ],
        np.int64,
    ).reshape(-1, 2)


def _best_span(logits_T2: np.ndarray, start: int, is_encoder: bool) -> tuple[int, int]:
    none = logits_T2[0 if is_encoder else -1].sum()
    first_C, last_C = logits_T2[start:-1].T  # the last token is the end of the text
    if not len(first_C):
        return -1, -1
    sums_CC = first_C[:, None] + last_C[None, :]
    lengths_CC = np.arange(len(first_C))[None, :] - np.arange(len(first_C))[:, None]
    is_span_CC = (lengths_CC >= 0) & (lengths_CC < _LONGEST_ANSWER)
    sums_CC = np.where(is_span_CC, sums_CC, -np.inf)
    first, last = np.unravel_index(np.argmax(sums_CC), sums_CC.shape)
    return (-1, -1) if none > sums_CC[first, last] else (int(first), int(last))


def _collected(
    config: config_lib.RunConfig,
    model: build.Model,
    found: Iterator[batch_lib.Batch],
    said: Callable[[batch_lib.Batch, jax.Array], tuple[jax.Array, ...]],
) -> list[tuple[np.ndarray, ...]]:
    """Returns what is said of each batch's label logits, on every host."""

    @jax.jit
    def run(model: build.Model, batch: batch_lib.Batch) -> tuple[jax.Array, ...]:
        x_BTD, _ = train_step.states(config, model, batch)
        return said(batch, model.label_logits(x_BTD, batch.segments))

    return [tuple(map(distributed.fetch, run(model, batch))) for batch in found]


def window_losses(
    config: config_lib.RunConfig,
    model: build.Model,
    mesh: jax.sharding.Mesh,
    rules: Any,
    cache: token_cache.TokenCache,
    stride: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the loss of each token that is predicted, in nats, float32 [N], and its place in the stream.

    Windows of `data.sequence_length` begin `stride` tokens apart, and each scores what those before it have not:
    a token sees at least length - stride tokens before it, where its document has so many.
    """
    length, size = config.data.sequence_length, config.data.batch_size
    place = jax.sharding.NamedSharding(mesh, rules.act("BT"))
    rows = placement.host_rows(place, (size, length))
    run = jax.jit(functools.partial(_token_losses, config))
    count = packing.num_windows(cache.num_tokens, length, stride)
    losses, places = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
    for start in range(0, count, size):
        indices = np.arange(start, start + size)
        indices = np.where(indices < count, indices, -1)
        how = {"length": length, "packing": config.data.packing, "stride": stride}
        local = packing.windows(cache, indices[rows], **how)
        found_BT, weights_BT = run(model, placement.to_mesh(local, place, size, rows))
        is_scored_BT = distributed.fetch(weights_BT) > 0
        losses.append(distributed.fetch(found_BT)[is_scored_BT])
        places.append((indices[:, None] * stride + np.arange(length) + 1)[is_scored_BT])
    return np.concatenate(losses), np.concatenate(places)


def _token_losses(
    config: config_lib.RunConfig, model: build.Model, batch: batch_lib.Batch
) -> tuple[jax.Array, jax.Array]:
    tokens, _ = train_step.token_losses(config, model, batch)
    return tokens.cross_entropy_BT, batch.weights


def kept_contexts(
    config: config_lib.RunConfig,
    cache: example_cache.ExampleCache,
    tokenizer: tokenizer_lib.Tokenizer,
) -> np.ndarray:
    """Returns where the context of each example begins in its row, int [N]."""
    data = dataclasses.replace(config.data, packing="none")
    stage = objectives.make(dataclasses.replace(config, data=data), cache, tokenizer)
    return stage.second_starts()
