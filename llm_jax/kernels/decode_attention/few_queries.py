"""Attention of a few queries by matrix products, where products of few rows are fast (`kernels.few_rows`)."""

import jax
import jax.numpy as jnp

from llm_jax.kernels.decode_attention import caches
from llm_jax.kernels.decode_attention import reference


def attention(
    q_BTKGC: jax.Array, k_BKCS: jax.Array, v_BKSC: jax.Array, *, scale: float, **how
) -> jax.Array:
    """As `op.attention`, of a `SlotsLast` cache. `how` is what `reference.weights` takes.

    Keys and values are read where they are and in their own dtype; sums are float32.
    """
    q_BKGTC = jnp.moveaxis(q_BTKGC, 1, 3)
    scores_BKGTS = _product("BKGTC,BKCS->BKGTS", q_BKGTC, k_BKCS) * scale
    weights_BKGTS = reference.weights(scores_BKGTS, **how).astype(v_BKSC.dtype)
    y_BKGTC = _product("BKGTS,BKSC->BKGTC", weights_BKGTS, v_BKSC)
    return jnp.moveaxis(y_BKGTC, 3, 1).astype(q_BTKGC.dtype)


def attention_of_beams(
    q_BTKGC: jax.Array, cache: caches.OfBeams, *, scale: float, **how
) -> jax.Array:
    """As `attention`, of beams (B * Q rows, T = 1) that read slots of each other.

    Each beam's query is multiplied with the keys of all beams of its row, which are read once for all
    of them, and takes of the scores those of the beam that holds the slot.
    """
    (B, Q, S), (_, _, K, G, C) = cache.origins_BQS.shape, q_BTKGC.shape
    # Whether beam O holds slot S of beam Q, for all heads and groups.
    is_there_BOQS = jnp.arange(Q)[:, None, None] == cache.origins_BQS[:, None]
    is_there_BOKGQS = is_there_BOQS[:, :, None, None]

    q_BKGQC = jnp.moveaxis(q_BTKGC.reshape(B, Q, K, G, C), 1, 3)
    # Keys and values stay rows of the cache: it would be copied if it were reshaped.
    q_BOKGQC = jnp.broadcast_to(q_BKGQC[:, None], (B, Q, *q_BKGQC.shape[1:]))
    q_BKGTC = q_BOKGQC.reshape(B * Q, K, G, Q, C)
    scores_BKGTS = _einsum("BKGTC,BKCS->BKGTS", q_BKGTC, cache.own.k_BKCS) * scale
    scores_BOKGQS = scores_BKGTS.reshape(B, Q, K, G, Q, S)
    scores_BKGQS = jnp.sum(jnp.where(is_there_BOKGQS, scores_BOKGQS, 0.0), axis=1)

    scores_BKGTS = jnp.moveaxis(scores_BKGQS, 3, 1).reshape(B * Q, K, G, 1, S)
    weights_BKGTS = reference.weights(scores_BKGTS, **how).astype(q_BTKGC.dtype)
    weights_BKGQS = jnp.moveaxis(weights_BKGTS.reshape(B, Q, K, G, S), 1, 3)
    weights_BOKGQS = jnp.where(is_there_BOKGQS, weights_BKGQS[:, None], 0)
    weights_BKGTS = weights_BOKGQS.reshape(B * Q, K, G, Q, S)
    y_BKGTC = _einsum("BKGTS,BKSC->BKGTC", weights_BKGTS, cache.own.v_BKSC)
    y_BKGQC = jnp.sum(y_BKGTC.reshape(B, Q, K, G, Q, C), axis=1)
    return jnp.moveaxis(y_BKGQC, 3, 1).reshape(q_BTKGC.shape).astype(q_BTKGC.dtype)


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _product(equation: str, x_BKGTC: jax.Array, matrix: jax.Array) -> jax.Array:
    """Returns the einsum, in float32. Of one row two are made, which is faster (`few_rows`)."""
    num_queries = x_BKGTC.shape[3]
    is_one_row = x_BKGTC.shape[2] * num_queries == 1
    if is_one_row:
        x_BKGTC = jnp.pad(x_BKGTC, [(0, 0)] * 3 + [(0, 1), (0, 0)])
    y = _einsum(equation, x_BKGTC, matrix)
    return y[:, :, :, :num_queries] if is_one_row else y
