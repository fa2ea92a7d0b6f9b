"""One signature for attention to a cache, in the layout that the cache has."""

import jax
import jax.numpy as jnp

from llm_jax.kernels.decode_attention import single_query
from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import placement
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
    """Attends to a cache: `flash_attention.reference.attention`, forward only, in another layout.

    Slots are the last dimension of the keys and the head width that of the values, so that both
    products read memory in order: `q @ k`, `weights @ v`. One query goes to `single_query`, more to
    the reference.

    Args:
      q_BTKGC: the new queries.
      k_BKCS, v_BKSC: the cache, written up to the last query.
      mask: which pairs of slots attend; slots not yet written must not be among them.
      scale, q_offset, softcap, bias, sinks_KG: as in the reference.

    Returns:
      [B, T, K, G, C] in the dtype of `q_BTKGC`.

    Raises:
      ValueError: shapes that do not fit each other.
    """
    _check_shapes(q_BTKGC, k_BKCS, v_BKSC)
    others = {"mask": mask, "bias": bias, "sinks_KG": sinks_KG}
    how = placement.like_queries(others, q_BTKGC)
    how |= {"scale": scale, "q_offset": q_offset, "softcap": softcap}
    if q_BTKGC.shape[1] == 1:
        return single_query.attention(q_BTKGC, k_BKCS, v_BKSC, **how)
    k_BSKC = jnp.transpose(k_BKCS, (0, 3, 1, 2))
    return reference.attention(q_BTKGC, k_BSKC, jnp.swapaxes(v_BKSC, 1, 2), **how)


def _check_shapes(q_BTKGC: jax.Array, k_BKCS: jax.Array, v_BKSC: jax.Array) -> None:
    q, k, v = q_BTKGC.shape, k_BKCS.shape, v_BKSC.shape
    do_fit = len(q) == 5 and len(k) == len(v) == 4 and (k[0], k[1], k[3], k[2]) == v
    if not do_fit or (q[0], q[2], q[4]) != k[:3]:
        raise ValueError(f"q [B,T,K,G,C] = {q}, k [B,K,C,S] = {k}, v [B,K,S,C] = {v} do not fit")
