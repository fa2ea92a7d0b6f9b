"""Attention of one query: scores by products and sums, values by one matrix product."""

import jax
import jax.numpy as jnp

from llm_jax.kernels.decode_attention import reference


def attention(
    q_BTKGC: jax.Array, k_BKCS: jax.Array, v_BKSC: jax.Array, *, scale: float, **how
) -> jax.Array:
    """As `op.attention`, for T = 1: the step of a generation. `how` is what `reference.weights` takes.

    With one query there is nothing for a matrix unit to reuse, and a product with float32 scores
    makes a CPU copy the keys into float32 first. Summed over the head width, slots lie side by side:
    the keys are read once, where they are and in their own dtype.
    """
    q_BKGC1 = q_BTKGC[:, 0, ..., None].astype(jnp.float32)
    scores_BKGS = jnp.sum(q_BKGC1 * k_BKCS[:, :, None].astype(jnp.float32), axis=-2) * scale
    weights_BKGTS = reference.weights(scores_BKGS[..., None, :], **how)
    weights_BKGS = weights_BKGTS[..., 0, :].astype(v_BKSC.dtype)
    y_BKGC = jnp.einsum("BKGS,BKSC->BKGC", weights_BKGS, v_BKSC)
    return y_BKGC[:, None].astype(q_BTKGC.dtype)
