"""From logits to the next token: pure functions on [B, V], each the identity at its neutral value."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from llm_jax import errors

_MASKED = float(jnp.finfo(jnp.float32).min)
_LOWEST_TEMPERATURE = float(jnp.finfo(jnp.float32).tiny)  # what is below becomes 0 in float32


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; the defaults sample from the model's own distribution.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_k: candidates kept; 0 keeps all.
      top_p: smallest set of candidates whose probabilities sum to this (Holtzman et al. 2020).
      min_p: candidates with at least this share of the best one's probability (Nguyen et al. 2024).
      repetition_penalty: divides positive and multiplies negative logits of tokens that the prompt
        or the text so far holds (Keskar et al. 2019, section 4.1); 1 is none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        checks = (
            ("temperature", self.temperature >= 0, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is none)"),
        )
        for name, holds, would_do in checks:
            value = getattr(self, name)
            if not (holds and math.isfinite(value)):
                raise errors.UserError(f"--{name}={value} must be {would_do}")


def penalise_repetition(logits_BV: jax.Array, is_seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Makes tokens that were seen less likely; see `SamplingParams`."""
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(is_seen_BV, penalised_BV, logits_BV)


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """Masks all but the `k` largest logits of each row (all of those that tie with the k-th)."""
    if k == 0 or k >= logits_BV.shape[-1]:
        return logits_BV
    threshold_B1 = jax.lax.top_k(logits_BV, k)[0][:, -1:]
    return jnp.where(logits_BV < threshold_B1, _MASKED, logits_BV)


def keep_top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Masks what lies outside of the nucleus of probability `p`; the best token always stays."""
    if p >= 1.0:
        return logits_BV
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token is kept if those before it do not reach p yet.
    is_kept_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < p
    threshold_B1 = jnp.min(jnp.where(is_kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV < threshold_B1, _MASKED, logits_BV)


def keep_min_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Masks tokens with less than `p` times the probability of the best one."""
    if p == 0.0:
        return logits_BV
    threshold_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + math.log(p)
    return jnp.where(logits_BV < threshold_B1, _MASKED, logits_BV)


def choose(
    logits_BV: jax.Array, is_seen_BV: jax.Array | None, params: SamplingParams, keys_B: jax.Array
) -> jax.Array:
    """Returns the next token of each row, int32 [B].

    Args:
      logits_BV: float32.
      is_seen_BV: which tokens a row holds already; None without a repetition penalty.
      params: the transforms, applied in the order penalty, temperature, top-k, top-p, min-p.
      keys_B: a key for each row, so that a row draws the same whatever its neighbours are.
    """
    if is_seen_BV is not None:
        logits_BV = penalise_repetition(logits_BV, is_seen_BV, params.repetition_penalty)
    if params.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # The best logit is moved to 0 first: however low the temperature is, nothing overflows.
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = logits_BV / max(params.temperature, _LOWEST_TEMPERATURE)
    logits_BV = keep_top_k(logits_BV, params.top_k)
    logits_BV = keep_top_p(logits_BV, params.top_p)
    logits_BV = keep_min_p(logits_BV, params.min_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
