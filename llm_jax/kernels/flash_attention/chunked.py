"""Attention by chunks of queries: scores never exist whole, forward or backward."""

import jax
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import mask as mask_lib
from llm_jax.kernels.flash_attention import reference


def attention(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    mask: mask_lib.AttentionMask,
    scale: float,
    chunk: int,
    softcap: float | None = None,
    alibi_slopes_KG: jax.Array | None = None,
) -> jax.Array:
    """As `reference.attention`, with `chunk` queries scored at a time.

    Each chunk is recomputed in the backward pass (Rabe and Staats 2021), so the memory for scores
    is B * H * chunk * S floats instead of B * H * T * S. Chunks that end before a key cut it off
    statically: causal attention costs about half of the square. A length that `chunk` does not
    divide gets a shorter last chunk.
    """
    num_queries, num_keys = q_BTKGC.shape[1], k_BSKC.shape[1]
    is_offset_known = isinstance(mask.offset, int)

    def scored(start: int) -> jax.Array:
        stop = min(start + chunk, num_queries)
        last_key = num_keys
        if mask.is_causal and is_offset_known:
            last_key = min(num_keys, mask.offset + stop)
        cut = mask_lib.AttentionMask(
            is_causal=mask.is_causal,
            window=mask.window,
            q_segments_BT=mask.q_segments_BT,
            k_segments_BS=None if mask.k_segments_BS is None else mask.k_segments_BS[:, :last_key],
            offset=mask.offset,
        )

        @jax.checkpoint
        def one(q_BTKGC, k_BSKC, v_BSKC, cut):
            return reference.attention(
                q_BTKGC,
                k_BSKC,
                v_BSKC,
                mask=cut,
                scale=scale,
                softcap=softcap,
                alibi_slopes_KG=alibi_slopes_KG,
                start=start,
            )

        return one(q_BTKGC[:, start:stop], k_BSKC[:, :last_key], v_BSKC[:, :last_key], cut)

    return jnp.concatenate([scored(start) for start in range(0, num_queries, chunk)], axis=1)
