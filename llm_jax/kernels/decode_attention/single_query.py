"""Attention of one query: scores by products and sums, values by one matrix product."""

import jax
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import mask as mask_lib


def attention(
    q_BTKGC: jax.Array,
    k_BKCS: jax.Array,
    v_BKSC: jax.Array,
    *,
    mask: mask_lib.AttentionMask,
    scale: float,
    softcap: float | None = None,
    alibi_slopes_KG: jax.Array | None = None,
) -> jax.Array:
    """As `op.attention`, for T = 1: the step of a generation.

    With one query there is nothing for a matrix unit to reuse, and a product with float32 scores
    makes a CPU copy the keys into float32 first. Summed over the head width, slots lie side by side:
    the keys are read once, where they are and in their own dtype.
    """
    num_keys = k_BKCS.shape[-1]
    q_BKGC1 = q_BTKGC[:, 0, ..., None].astype(jnp.float32)
    scores_BKGS = jnp.sum(q_BKGC1 * k_BKCS[:, :, None].astype(jnp.float32), axis=-2) * scale
    if softcap is not None:
        scores_BKGS = softcap * jnp.tanh(scores_BKGS / softcap)
    if alibi_slopes_KG is not None:
        distance_S = mask.distance_TS(1, num_keys)[0]
        scores_BKGS = scores_BKGS - alibi_slopes_KG[..., None] * jnp.abs(distance_S)
    allowed_B11S = mask.allowed_BTS(1, num_keys)[:, None]
    scores_BKGS = jnp.where(allowed_B11S, scores_BKGS, jnp.finfo(jnp.float32).min)
    weights_BKGS = jnp.where(allowed_B11S, jax.nn.softmax(scores_BKGS, axis=-1), 0.0)
    y_BKGC = jnp.einsum("BKGS,BKSC->BKGC", weights_BKGS.astype(v_BKSC.dtype), v_BKSC)
    return y_BKGC[:, None].astype(q_BTKGC.dtype)
