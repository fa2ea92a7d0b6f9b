"""Attention of one query, as products and sums instead of matrix products."""

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
) -> jax.Array:
    """As `reference.attention`, for T = 1: the step of a generation.

    With one query there is nothing for a matrix unit to reuse. The cache is read once, where it
    lies and in its own dtype; a matrix product makes a CPU copy it into float32 first.
    """
    num_keys = k_BSKC.shape[1]
    q_B1KGC = q_BTKGC.astype(jnp.float32)
    scores_BSKG = jnp.sum(q_B1KGC * k_BSKC[:, :, :, None, :].astype(jnp.float32), axis=-1) * scale
    if softcap is not None:
        scores_BSKG = softcap * jnp.tanh(scores_BSKG / softcap)
    if alibi_slopes_KG is not None:
        distance_S = mask.distance_TS(1, num_keys)[0]
        scores_BSKG = scores_BSKG - alibi_slopes_KG * jnp.abs(distance_S)[:, None, None]
    allowed_BS11 = mask.allowed_BTS(1, num_keys)[:, 0, :, None, None]
    scores_BSKG = jnp.where(allowed_BS11, scores_BSKG, jnp.finfo(jnp.float32).min)
    weights_BSKG = jnp.where(allowed_BS11, jax.nn.softmax(scores_BSKG, axis=1), 0.0)
    y_BKGC = jnp.sum(weights_BSKG[..., None] * v_BSKC[:, :, :, None, :].astype(jnp.float32), axis=1)
    return y_BKGC[:, None].astype(q_BTKGC.dtype)
