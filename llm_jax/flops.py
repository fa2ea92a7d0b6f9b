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


def layer_params(
    m: config_lib.ModelConfig, has_cross: bool = False, experts: float | None = None
) -> float:
    """Returns how many parameters of one layer take part in matrix products.

    Args:
      m: the model.
      has_cross: whether the layer attends to an encoder, too.
      experts: how many of its experts are counted, beside those that all tokens share; None: it is dense.
    """
    attention = m.embed_dim * m.head_width * 2 * (m.num_heads + m.kv_heads)
    if m.kv_latent_dim is not None:
        attention = _latent_attention_params(m)
    width = m.mlp_width
    router = 0
    if experts is not None:
        width = m.expert_width * (experts + m.moe.num_shared_experts)
        router = _router_params(m)
    mlp = (3 if m.is_gated else 2) * m.embed_dim * width
    return (2 if has_cross else 1) * attention + mlp + router


def _router_params(m: config_lib.ModelConfig) -> int:
    if m.moe.router in ("hash", "random"):
        return 0
    slots = m.moe.num_experts * m.moe.slots_per_expert
    # Soft ones score slots, fill them and empty them.
    return m.embed_dim * slots * (3 if m.moe.router == "soft" else 1)


def _stack_params(
    m: config_lib.ModelConfig, stack: str, num_layers: int, length: int, has_cross: bool = False
) -> float:
    """Returns the parameters that multiply a token of a stack's rows of a length."""
    experts = float(m.moe.experts_per_token)
    if m.moe.router == "soft":
        experts = m.moe.num_experts * m.moe.slots_per_expert / length
    is_expert = m.expert_layers(num_layers) if m.has_experts(stack) else (False,) * num_layers
    return sum(layer_params(m, has_cross, experts if own else None) for own in is_expert)


def _latent_attention_params(m: config_lib.ModelConfig) -> int:
    D, H = m.embed_dim, m.num_heads
    queries = D * H * m.key_width
    if m.q_latent_dim is not None:
        queries = m.q_latent_dim * (D + H * m.key_width)
    latent = D * (m.kv_latent_dim + m.rope_head_width)
    expanded = m.kv_latent_dim * H * (m.head_width + m.value_width)
    return queries + latent + expanded + H * m.value_width * D


def head_params(m: config_lib.ModelConfig) -> int:
    """Returns how many parameters multiply the state of each token, or of each labelled sequence."""
    if m.head == "none":
        return 0
    outputs = {"lm": m.vocab_size, "span": 2}.get(m.head, m.num_labels)
    num_square = m.use_head_transform + (m.use_pooler and m.head == "sequence")
    return m.embed_dim * outputs + num_square * m.embed_dim**2


def matmul_params(m: config_lib.ModelConfig) -> float:
    """Returns how many parameters of a decoder or an encoder multiply the state of each token."""
    return _stack_params(m, m.architecture, m.num_layers, m.max_length) + head_params(m)


def forward_flops_per_row(m: config_lib.ModelConfig, length: int, target_length: int = 0) -> float:
    """Returns the operations of a forward pass for one row.

    Attention counts the keys that a query sees on average, not the whole square.

    Args:
      m: the model.
      length: tokens of a row, of an encoder-decoder's encoder.
      target_length: tokens of its decoder's row.
    """
    is_causal = m.architecture == "decoder"
    pairs = sum(_num_pairs(m, kind, length, is_causal) for kind in _kinds(m, m.num_layers))
    per_pair = 2 * m.num_heads * (m.key_width + m.value_width)
    stack = "encoder" if m.architecture == "encoder_decoder" else m.architecture
    products = _stack_params(m, stack, m.num_layers, length) * length
    read = 1 if m.head == "sequence" else length
    if m.architecture == "encoder_decoder":
        kinds = _kinds(m, m.decoder_layers)
        pairs += sum(_num_pairs(m, kind, target_length, is_causal=True) for kind in kinds)
        pairs += m.decoder_layers * length * target_length
        # Keys and values of cross-attention are of the encoder's tokens, all else of the decoder's.
        keys = 2 * m.embed_dim * m.head_width * m.kv_heads
        layers = m.decoder_layers
        own = _stack_params(m, "decoder", layers, target_length, has_cross=True) - layers * keys
        products += own * target_length + layers * keys * length
        read = target_length
    return 2.0 * (products + head_params(m) * read) + per_pair * pairs


def _kinds(m: config_lib.ModelConfig, num_layers: int) -> str:
    """Returns for each layer whether it has the window: L or G."""
    pattern = m.layer_pattern or ("G" if m.window is None else "L")
    return (pattern * num_layers)[:num_layers]


def _num_pairs(m: config_lib.ModelConfig, kind: str, length: int, is_causal: bool) -> float:
    """Returns how many pairs of a query and a key that it sees a row has."""
    window = m.window if kind == "L" else None
    if is_causal:
        seen = length if window is None else min(window, length)
        # Queries 1 .. seen see 1 .. seen keys; the rest see `seen` each.
        return seen * (seen + 1) / 2 + (length - seen) * seen
    if window is None:
        return float(length) * length
    side = min(window // 2, length - 1)
    # All keys within `side` of a query, but for those that would lie outside of the row.
    return float(length) * (2 * side + 1) - side * (side + 1)


def forward_flops_per_token(
    m: config_lib.ModelConfig, length: int, target_length: int = 0
) -> float:
    """Returns the operations of a forward pass for each token that a row has in all."""
    return forward_flops_per_row(m, length, target_length) / (length + target_length)


def train_flops_per_token(m: config_lib.ModelConfig, length: int, target_length: int = 0) -> float:
    """Returns the operations of a forward and a backward pass for one token."""
    return 3.0 * forward_flops_per_token(m, length, target_length)


def peak_flops(device: jax.Device) -> float | None:
    """Returns the peak FLOP/s of a device, or None where it is not known (a CPU, say)."""
    kind = device.device_kind
    return PEAK_FLOPS[kind] if kind in PEAK_FLOPS else None


def num_params(model) -> int:
    """Returns the number of parameters of a model, abstract or not."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))
