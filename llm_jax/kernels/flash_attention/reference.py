"""Attention in plain jnp: the semantics that every other implementation is held to."""

import jax
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import mask as mask_lib


def attention(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    mask: mask_lib.AttentionMask,
    scale: float,
    softcap: float | None = None,
    alibi_slopes_KG: jax.Array | None = None,
    start: jax.Array | int = 0,
) -> jax.Array:
    """Scaled dot-product attention with grouped heads (Vaswani et al. 2017, section 3.2.1;
    Ainslie et al. 2023 for the groups).

    Args:
      q_BTKGC: queries; G query heads share each of K key-value heads.
      k_BSKC: keys.
      v_BSKC: values.
      mask: which pairs attend.
      scale: factor of the scores, commonly C**-0.5.
      softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, section 2).
      alibi_slopes_KG: slope of each head's penalty on distance (Press et al. 2022).
      start: index of the first query within the mask's, for callers that cut the queries up.

    Returns:
      [B, T, K, G, C] in the dtype of `q_BTKGC`. The softmax runs in float32. A query that sees no
      key gets zeros.
    """
    num_queries, num_keys = q_BTKGC.shape[1], k_BSKC.shape[1]
    scores_BKGTS = jnp.einsum(
        "BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32
    )
    scores_BKGTS = scores_BKGTS * scale
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    if alibi_slopes_KG is not None:
        distance_TS = mask.distance_TS(num_queries, num_keys, start)
        scores_BKGTS = scores_BKGTS - alibi_slopes_KG[..., None, None] * jnp.abs(distance_TS)
    allowed_BTS = mask.allowed_BTS(num_queries, num_keys, start)
    allowed_B11TS = allowed_BTS[:, None, None]
    scores_BKGTS = jnp.where(allowed_B11TS, scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    weights_BKGTS = jnp.where(allowed_B11TS, weights_BKGTS, 0.0).astype(v_BSKC.dtype)
    return jnp.einsum("BKGTS,BSKC->BTKGC", weights_BKGTS, v_BSKC).astype(q_BTKGC.dtype)
