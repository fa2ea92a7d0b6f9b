"""Attention of one query: scores by products and sums, values by one matrix product."""

import jax
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import reference


def attention(
    q_BTKGC: jax.Array,
    k_BKCS: jax.Array,
    v_BKSC: jax.Array,
    *,
    mask: masks.Mask,
    scale: float,
    q_offset: jax.Array | int,
    softcap: float | None = None,
    bias: biases.Bias | None = None,
    sinks_KG: jax.Array | None = None,
) -> jax.Array:
    """As `op.attention`, for T = 1: the step of a generation.

    With one query there is nothing for a matrix unit to reuse, and a product with float32 scores
    makes a CPU copy the keys into float32 first. Summed over the head width, slots lie side by side:
    the keys are read once, where they are and in their own dtype.
    """
    t_T, s_S = q_offset + jnp.arange(1), jnp.arange(k_BKCS.shape[-1])
    q_BKGC1 = q_BTKGC[:, 0, ..., None].astype(jnp.float32)
    scores_BKGS = jnp.sum(q_BKGC1 * k_BKCS[:, :, None].astype(jnp.float32), axis=-2) * scale
    if softcap is not None:
        scores_BKGS = softcap * jnp.tanh(scores_BKGS / softcap)
    scores_BKGTS = scores_BKGS[..., None, :]
    if bias is not None:
        scores_BKGTS = scores_BKGTS + bias.scores_BKGTS(t_T, s_S)
    allowed_B11TS = masks.allowed_BTS(mask, t_T, s_S)[:, None, None]
    weights_BKGTS = reference.masked_softmax(scores_BKGTS, allowed_B11TS, sinks_KG)
    weights_BKGS = weights_BKGTS[..., 0, :].astype(v_BKSC.dtype)
    y_BKGC = jnp.einsum("BKGS,BKSC->BKGC", weights_BKGS, v_BKSC)
    return y_BKGC[:, None].astype(q_BTKGC.dtype)
