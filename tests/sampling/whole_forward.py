"""What a whole forward pass says of the next token, for tests of what reads caches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.models import encoder_decoder
from llm_jax.sampling import cache as cache_lib
from llm_jax.sampling import decode

_LENGTH = 24  # of all texts, so that one program serves them

_forward = jax.jit(lambda model, *args, **kwargs: model(*args, **kwargs))


def is_pair(model) -> bool:
    """Returns whether a model, or one that was prepared, has an encoder."""
    whole = model.model if isinstance(model, decode.CachedModel) else model
    return isinstance(whole, encoder_decoder.EncoderDecoder)


def _padded(tokens) -> jax.Array:
    return jnp.asarray([[*tokens, *[0] * (_LENGTH - len(tokens))]], jnp.int32)


def logits(model, tokens, source=None) -> np.ndarray:
    """Returns the logits [T, V] after each of a text's tokens; `source` is what an encoder reads."""
    positions = jnp.arange(_LENGTH)[None]
    inputs = {}
    if source is not None:
        inputs = {
            "encoder_tokens_BS": _padded(source),
            "encoder_positions_BS": positions,
            "encoder_segments_BS": (positions < len(source)).astype(jnp.int32),
        }
    logits_BTV = _forward(model, _padded(tokens), positions, **inputs)
    return np.asarray(logits_BTV)[0, : len(tokens)]


def next_log_probs(
    model, row, *, repetition_penalty: float = 1.0, num_ids: int | None = None
) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Returns what gives the log-probabilities after a prompt, or of a source, and some tokens."""
    start = [model.config.decoder_start_id] if is_pair(model) else list(row)
    source = row if is_pair(model) else None

    def after(tokens: tuple[int, ...]) -> np.ndarray:
        text = [*start, *tokens]
        logits_V = logits(model, text, source)[-1].astype(np.float64)
        log_probs_V = logits_V - logits_V.max()
        log_probs_V = log_probs_V - np.log(np.exp(log_probs_V).sum())
        log_probs_V[sorted(set(text))] *= repetition_penalty
        return log_probs_V if num_ids is None else log_probs_V[:num_ids]

    return after


def inputs(
    ready: decode.CachedModel, rows, *, length: int, forced=None
) -> tuple[jax.Array, jax.Array, cache_lib.Encoded | None]:
    """Returns what is read first, [B, T], where it begins, [B], and what an encoder has read of the rows.

    Prompts are padded on the left to `length`, sources on the right, with a token that is none of
    theirs. `forced` are the tokens of each row that a decoder with an encoder begins with.
    """
    act = ready.rules.act
    lengths = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.full((len(rows), length), 1, np.int32)
    for index, row in enumerate(rows):
        start = 0 if is_pair(ready) else length - len(row)
        tokens[index, start : start + len(row)] = row
    tokens_BS = jax.device_put(tokens, act("BS"))
    if not is_pair(ready):
        return tokens_BS, jax.device_put(length - lengths, act("B")), None
    encoded = decode.encode(ready, tokens_BS, jax.device_put(lengths, act("B")))
    first = np.full((len(rows), 1), ready.config.decoder_start_id, np.int32)
    first = first if forced is None else np.asarray(forced, np.int32)
    return jax.device_put(first, act("BS")), jax.device_put(0 * lengths, act("B")), encoded
