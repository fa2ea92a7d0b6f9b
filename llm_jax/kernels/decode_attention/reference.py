"""Attention to a cache in plain jnp: the semantics that every other implementation is held to."""

import jax
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import reference


def attention(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    lengths_B: jax.Array,
    starts_B: jax.Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bias: biases.Alibi | biases.Relative | None = None,
    sinks_KG: jax.Array | None = None,
    is_causal: bool = True,
) -> jax.Array:
    """As `op.attention`, of keys and values by slot."""
    # In float32 from the start: XLA has no products of bfloat16 with float32 sums for a CPU in every
    # layout that a cache may have.
    k_BSKC = k_BSKC.astype(jnp.float32)
    scores_BKGTS = jnp.einsum("BTKGC,BSKC->BKGTS", q_BTKGC.astype(jnp.float32), k_BSKC)
    weights_BKGTS = weights(
        scores_BKGTS * scale,
        lengths_B=lengths_B,
        starts_B=starts_B,
        window=window,
        softcap=softcap,
        bias=bias,
        sinks_KG=sinks_KG,
        is_causal=is_causal,
    )
    weights_BKGTS = weights_BKGTS.astype(v_BSKC.dtype)
    return jnp.einsum("BKGTS,BSKC->BTKGC", weights_BKGTS, v_BSKC).astype(q_BTKGC.dtype)


def weights(
    scores_BKGTS: jax.Array,
    *,
    lengths_B: jax.Array,
    starts_B: jax.Array,
    window: int | None,
    softcap: float | None,
    bias: biases.Alibi | biases.Relative | None,
    sinks_KG: jax.Array | None,
    is_causal: bool,
) -> jax.Array:
    """Returns the weights of scaled scores; zeros for what a query does not see."""
    T, S = scores_BKGTS.shape[-2:]
    # Queries that see their whole row are all at its last slot.
    slots_before_end = jnp.arange(-T, 0) if is_causal else jnp.full(T, -1)
    t_BTS = (lengths_B[:, None] + slots_before_end)[..., None]
    s_S = jnp.arange(S)
    allowed_BTS = (s_S <= t_BTS) & (s_S >= starts_B[:, None, None])
    if window is not None:
        allowed_BTS &= s_S > t_BTS - window
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    if bias is not None:
        term_KGBTS = bias.by_distance_KGD(t_BTS - s_S)
        scores_BKGTS = scores_BKGTS + jnp.moveaxis(term_KGBTS, 2, 0)
    return reference.masked_softmax(scores_BKGTS, allowed_BTS[:, None, None], sinks_KG)
