"""Attention by `jax.nn.dot_product_attention`: cuDNN's fused kernel on GPUs, plain XLA elsewhere."""

import jax
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import dropout as dropout_lib
from llm_jax.kernels.flash_attention import masks


def attention(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    mask: masks.Mask,
    scale: float,
    device_kind: str,
    q_offset: jax.Array | int = 0,
    softcap: float | None = None,
    bias: biases.Bias | None = None,
    sinks_KG: jax.Array | None = None,
    dropout: dropout_lib.Dropout | None = None,
) -> jax.Array:
    """As `reference.attention`, by the library; its gradients are the library's as well.

    A causal mask and a causal window go to the library by name, so that it can leave out what they
    hide; any other mask goes as an array [B, 1, T, S], and a bias as [B, H, T, S].

    Args:
      device_kind: what the program is compiled for; with the dtype it decides whether cuDNN runs.

    Raises:
      ValueError: scores that the library does not know.
    """
    reason = refusal(q_BTKGC, v_BSKC, softcap, sinks_KG, dropout)
    if reason is not None:
        raise ValueError(f"attention 'jax_nn' {reason}; use 'chunked'")
    B, T, K, G, C = q_BTKGC.shape
    t_T, s_S = q_offset + jnp.arange(T), jnp.arange(k_BSKC.shape[1])
    allowed_BTS, how = None, _named(mask, T, k_BSKC.shape[1], q_offset)
    if how is None:
        allowed_BTS, how = masks.allowed_BTS(mask, t_T, s_S), {}
        how["mask"] = allowed_BTS[:, None]
    if bias is not None:
        term_BKGTS = bias.scores_BKGTS(t_T, s_S)
        # The library takes [B or 1, H, T, S]; a bias shared by heads is spread over them.
        term_BKGTS = jnp.broadcast_to(
            term_BKGTS, (term_BKGTS.shape[0], K, G, *term_BKGTS.shape[3:])
        )
        how["bias"] = term_BKGTS.reshape(-1, K * G, *term_BKGTS.shape[3:])
    is_fused = has_cudnn(q_BTKGC, v_BSKC, bias, device_kind)
    y_BTHC = jax.nn.dot_product_attention(
        q_BTKGC.reshape(B, T, K * G, C),
        k_BSKC,
        v_BSKC,
        scale=scale,
        implementation="cudnn" if is_fused else "xla",
        **how,
    )
    y_BTKGC = y_BTHC.reshape(q_BTKGC.shape)
    if allowed_BTS is None:
        return y_BTKGC
    # The library gives a query that sees no key the mean of all values.
    sees_BT = jnp.any(allowed_BTS, axis=-1)
    return jnp.where(sees_BT[..., None, None, None], y_BTKGC, jnp.zeros_like(y_BTKGC))


def refusal(
    q_BTKGC: jax.Array,
    v_BSKC: jax.Array,
    softcap: float | None,
    sinks_KG: jax.Array | None,
    dropout: dropout_lib.Dropout | None,
) -> str | None:
    """Returns why the library does not take these arguments, or None where it does."""
    for name, value in (("soft-cap", softcap), ("sinks", sinks_KG), ("dropout", dropout)):
        if value is not None:
            return f"has no {name}"
    if q_BTKGC.shape[-1] != v_BSKC.shape[-1]:
        return f"needs keys and values of one width, not {q_BTKGC.shape[-1]} and {v_BSKC.shape[-1]}"
    return None


def has_cudnn(
    q_BTKGC: jax.Array, v_BSKC: jax.Array, bias: biases.Bias | None, device_kind: str
) -> bool:
    """Returns whether cuDNN's kernel takes these arrays: 16 bits, widths of 8 to 128 by eights.

    It would have a bias in 16 bits too, which cannot tell distances beyond 256 apart.
    """
    is_gpu = device_kind.startswith("NVIDIA")
    is_half = q_BTKGC.dtype in (jnp.bfloat16, jnp.float16) and v_BSKC.dtype == q_BTKGC.dtype
    width = q_BTKGC.shape[-1]
    return bias is None and is_gpu and is_half and width % 8 == 0 and width <= 128


def _named(mask: masks.Mask, T: int, S: int, q_offset: jax.Array | int) -> dict | None:
    """Returns a mask as the library's own arguments, None where it has no name for it."""
    if not isinstance(mask, masks.Band) or mask.right != 0 or T != S:
        return None
    if not isinstance(q_offset, int) or q_offset != 0:
        return None
    named = {"is_causal": True}
    if mask.left is not None:
        named["local_window_size"] = (mask.left, 0)
    return named
