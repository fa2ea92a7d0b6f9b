"""One signature for every implementation of attention."""

import jax

from llm_jax.kernels.flash_attention import chunked
from llm_jax.kernels.flash_attention import mask as mask_lib
from llm_jax.kernels.flash_attention import reference


def attention(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    mask: mask_lib.AttentionMask,
    scale: float,
    implementation: str,
    chunk: int,
    softcap: float | None = None,
    alibi_slopes_KG: jax.Array | None = None,
) -> jax.Array:
    """Attends by the named implementation; arguments and result as `reference.attention`.

    `auto` takes `chunked` for more queries than one chunk holds (the scores would weigh more than
    the rest of the layer), and `reference` below.

    Raises:
      ValueError: shapes that do not fit each other, or an unknown implementation.
    """
    _check_shapes(q_BTKGC, k_BSKC, v_BSKC)
    num_queries = q_BTKGC.shape[1]
    if implementation == "auto":
        implementation = "chunked" if num_queries > chunk else "reference"
    extra = {"softcap": softcap, "alibi_slopes_KG": alibi_slopes_KG}
    if implementation == "reference":
        return reference.attention(q_BTKGC, k_BSKC, v_BSKC, mask=mask, scale=scale, **extra)
    if implementation == "chunked":
        return chunked.attention(
            q_BTKGC, k_BSKC, v_BSKC, mask=mask, scale=scale, chunk=chunk, **extra
        )
    raise ValueError(
        f"attention implementation {implementation!r} is none of auto, reference, chunked"
    )


def _check_shapes(q_BTKGC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array) -> None:
    q, k, v = q_BTKGC.shape, k_BSKC.shape, v_BSKC.shape
    if len(q) != 5 or len(k) != 4 or k != v or (q[0], q[2], q[4]) != (k[0], k[2], k[3]):
        raise ValueError(f"q [B,T,K,G,C] = {q}, k and v [B,S,K,C] = {k}, {v} do not fit together")
