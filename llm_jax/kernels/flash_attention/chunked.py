"""Attention by chunks of queries: scores never exist whole, forward or backward."""

import jax
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import dropout as dropout_lib
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import reference

# Keys are left out in whole blocks of this many.
_KEY_BLOCK = 128


def attention(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    mask: masks.Mask,
    scale: float,
    chunk: int,
    q_offset: jax.Array | int = 0,
    softcap: float | None = None,
    bias: biases.Bias | None = None,
    sinks_KG: jax.Array | None = None,
    dropout: dropout_lib.Dropout | None = None,
) -> jax.Array:
    """As `reference.attention`, with `chunk` queries scored at a time.

    Each chunk is recomputed in the backward pass (Rabe and Staats 2021), so the memory for scores
    is B * H * chunk * S floats instead of B * H * T * S. Keys that the mask hides from a whole
    chunk, whatever its arrays hold, are left out: causal attention costs about half of the square,
    a window its width. A length that `chunk` does not divide gets a shorter last chunk.
    """
    num_queries, num_keys = q_BTKGC.shape[1], k_BSKC.shape[1]

    def scored(start: int) -> jax.Array:
        queries = range(start, min(start + chunk, num_queries))
        keys = range(num_keys)
        if isinstance(q_offset, int):
            # One block at least: a chunk that sees nothing still has a result, of zeros.
            keys = masks.visible_keys(mask, queries, num_keys, q_offset, _KEY_BLOCK) or keys[:1]
        of_queries = slice(queries.start, queries.stop)
        of_keys = slice(keys.start, keys.stop)

        @jax.checkpoint
        def one(q_BTKGC, k_BSKC, v_BSKC, mask, bias, sinks_KG, dropout):
            return reference.attention(
                q_BTKGC,
                k_BSKC,
                v_BSKC,
                mask=mask,
                scale=scale,
                q_offset=q_offset,
                softcap=softcap,
                bias=bias,
                sinks_KG=sinks_KG,
                dropout=dropout,
                q_start=queries.start,
                k_start=keys.start,
            )

        return one(
            q_BTKGC[:, of_queries],
            k_BSKC[:, of_keys],
            v_BSKC[:, of_keys],
            masks.cut(mask, of_queries, of_keys),
            biases.cut(bias, of_queries, of_keys),
            sinks_KG,
            dropout,
        )

    return jnp.concatenate([scored(start) for start in range(0, num_queries, chunk)], axis=1)
