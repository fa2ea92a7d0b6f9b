"""Analytic floating-point operations of a model, and what share of a device's peak they are.

The compiler's own count leaves custom kernels out and counts recomputation, so utilisation is
figured from the model (Chowdhery et al. 2022, appendix B): matrix products alone, two operations a
multiply-add, a backward pass twice the forward, recomputation not counted.
"""

import jax

from llm_jax import config as config_lib

# Peak dense bfloat16 FLOP/s of one JAX device, from Google's published specifications.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
}


def matmul_params(m: config_lib.ModelConfig) -> int:
    """Returns how many parameters take part in a matrix product for each token."""
    attention = m.embed_dim * m.head_width * 2 * (m.num_heads + m.kv_heads)
    mlp = (3 if m.is_gated else 2) * m.embed_dim * m.mlp_width
    return m.num_layers * (attention + mlp) + m.embed_dim * m.vocab_size


def forward_flops_per_token(m: config_lib.ModelConfig, length: int) -> float:
    """Returns the operations of a forward pass for one token of a sequence of `length` tokens.

    Attention counts the keys that a causal query sees on average, not the whole square.
    """
    window = length if m.window is None else min(m.window, length)
    # Queries 1 .. window see 1 .. window keys; the rest see `window` each.
    mean_keys = (window * (window + 1) / 2 + (length - window) * window) / length
    scores_and_values = 2 * 2 * m.num_heads * m.head_width * mean_keys
    return 2.0 * matmul_params(m) + m.num_layers * scores_and_values


def train_flops_per_token(m: config_lib.ModelConfig, length: int) -> float:
    """Returns the operations of a forward and a backward pass for one token."""
    return 3.0 * forward_flops_per_token(m, length)


def peak_flops(device: jax.Device) -> float | None:
    """Returns the peak FLOP/s of a device, or None where it is not known (a CPU, say)."""
    kind = device.device_kind
    return PEAK_FLOPS[kind] if kind in PEAK_FLOPS else None


def num_params(model) -> int:
    """Returns the number of parameters of a model, abstract or not."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))
