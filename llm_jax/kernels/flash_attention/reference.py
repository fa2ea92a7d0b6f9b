"""Attention in plain jnp: the semantics that every other implementation is held to."""

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import dropout as dropout_lib
from llm_jax.kernels.flash_attention import masks


def attention(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    mask: masks.Mask,
    scale: float,
    q_offset: jax.Array | int = 0,
    softcap: float | None = None,
    bias: biases.Bias | None = None,
    sinks_KG: jax.Array | None = None,
    dropout: dropout_lib.Dropout | None = None,
    q_start: int = 0,
    k_start: int = 0,
) -> jax.Array:
    """Scaled dot-product attention with grouped heads (Vaswani et al. 2017, section 3.2.1;
    Ainslie et al. 2023 for the groups).

    Args:
      q_BTKGC: queries; G query heads share each of K key-value heads.
      k_BSKC: keys.
      v_BSKC: values; their width may differ from that of the keys.
      mask: which pairs of slots attend.
      scale: factor of the scores, commonly C**-0.5.
      q_offset: slot of the first query; keys begin at slot 0. A cache makes it more than 0.
      softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, section 2).
      bias: added to the scores after that.
      sinks_KG: float32 logits, one a head, that join the softmax and attend to nothing (Xiao et al.
        2024; gpt-oss learns them).
      dropout: of the weights, after the softmax.
      q_start, k_start: for callers that cut queries and keys up: how many come before these. Mask
        and bias are cut already.

    Returns:
      [B, T, K, G, C of the values] in the dtype of `q_BTKGC`. The softmax runs in float32. A query
      that sees no key gets zeros.
    """
    weights_BKGTS = weights(
        q_BTKGC,
        k_BSKC,
        mask=mask,
        scale=scale,
        q_offset=q_offset,
        softcap=softcap,
        bias=bias,
        sinks_KG=sinks_KG,
        q_start=q_start,
        k_start=k_start,
    )
    if dropout is not None:
        weights_BKGTS = weights_BKGTS * dropout_factors(
            dropout,
            weights_BKGTS.shape,
            q_start + jnp.arange(q_BTKGC.shape[1]),
            k_start + jnp.arange(k_BSKC.shape[1]),
        )
    weights_BKGTS = weights_BKGTS.astype(v_BSKC.dtype)
    return jnp.einsum("BKGTS,BSKC->BTKGC", weights_BKGTS, v_BSKC).astype(q_BTKGC.dtype)


def weights(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    *,
    mask: masks.Mask,
    scale: float,
    q_offset: jax.Array | int = 0,
    softcap: float | None = None,
    bias: biases.Bias | None = None,
    sinks_KG: jax.Array | None = None,
    q_start: int = 0,
    k_start: int = 0,
) -> jax.Array:
    """Returns the weights that `attention` sums values by, float32 [B, K, G, T, S]; arguments as there."""
    scores_BKGTS, allowed_B11TS = scores(
        q_BTKGC,
        k_BSKC,
        mask=mask,
        scale=scale,
        q_offset=q_offset,
        softcap=softcap,
        bias=bias,
        q_start=q_start,
        k_start=k_start,
    )
    return masked_softmax(scores_BKGTS, allowed_B11TS, sinks_KG)


def scores(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    *,
    mask: masks.Mask,
    scale: float,
    q_offset: jax.Array | int = 0,
    softcap: float | None = None,
    bias: biases.Bias | None = None,
    q_start: int = 0,
    k_start: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Returns the scores that `attention` makes weights of, float32 [B, K, G, T, S], and which of them count."""
    num_queries, num_keys = q_BTKGC.shape[1], k_BSKC.shape[1]
    t_T = q_offset + q_start + jnp.arange(num_queries)
    s_S = k_start + jnp.arange(num_keys)
    scores_BKGTS = jnp.einsum(
        "BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32
    )
    scores_BKGTS = scores_BKGTS * scale
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    if bias is not None:
        scores_BKGTS = scores_BKGTS + bias.scores_BKGTS(t_T, s_S)
    allowed_B11TS = masks.allowed_BTS(mask, t_T, s_S)[:, None, None]
    return scores_BKGTS, allowed_B11TS


def masked_softmax(
    scores_BKGTS: jax.Array, allowed: jax.Array, sinks_KG: jax.Array | None
) -> jax.Array:
    """Returns the weights of allowed keys; zeros where a query has none.

    A sink is one more key, whose weight is left out of the result.
    """
    lowest = jnp.finfo(scores_BKGTS.dtype).min
    scores_BKGTS = jnp.where(allowed, scores_BKGTS, lowest)
    if sinks_KG is None:
        weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    else:
        # Onto zeros, so that it lies as the scores do.
        sinks_BKGT1 = jnp.zeros_like(scores_BKGTS[..., :1]) + sinks_KG[:, :, None, None]
        with_sink = jnp.concatenate([scores_BKGTS, sinks_BKGT1], axis=-1)
        weights_BKGTS = jax.nn.softmax(with_sink, axis=-1)[..., :-1]
    return jnp.where(allowed, weights_BKGTS, 0.0)


def dropout_factors(
    dropout: dropout_lib.Dropout, shape: tuple[int, ...], t_T: Any, s_S: Any
) -> jax.Array:
    """Returns the factors of all weights, [B, K, G, T, S]; queries count from 0, whatever slot."""
    B, K, G = shape[:3]
    row = jnp.arange(B)[:, None, None, None, None]
    head = (jnp.arange(K)[:, None] * G + jnp.arange(G))[:, :, None, None]
    return dropout.factors(row, head, t_T[:, None], s_S[None, :])
