"""GPT-2 and Llama in numpy float64, written from the papers; nothing here is shared with llm_jax.

Weights come as a dict of arrays by the names that the model's tree has, e.g.
`stack.layers.mlp.up_DF`; a leading dimension of `stack.layers` counts layers.
"""

import math

import jax
import numpy as np


def weights_of(model) -> dict[str, np.ndarray]:
    """Returns every parameter of a model in float64, by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(model))[0]
    return {
        jax.tree_util.keystr(path).removeprefix(".").removesuffix(".value"): np.asarray(
            leaf, np.float64
        )
        for path, leaf in leaves
    }


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last dimension."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _causal_heads(q, k, v):
    """One head at a time: q, k, v are [T, C]."""
    length, width = q.shape
    y = np.zeros_like(q)
    for t in range(length):
        y[t] = softmax(k[: t + 1] @ q[t] / math.sqrt(width)) @ v[: t + 1]
    return y


def _layer(weights, index):
    prefix = "stack.layers."
    return {n.removeprefix(prefix): w[index] for n, w in weights.items() if n.startswith(prefix)}


def gpt2(weights: dict[str, np.ndarray], tokens: np.ndarray, num_layers: int) -> np.ndarray:
    """Returns logits [T, V] (Radford et al. 2019, section 2.3; GELU by tanh as in its code)."""

    def layer_norm(x, scale, bias):
        variance = x.var(-1, keepdims=True)
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-5) * scale + bias

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = weights["embedding.table_VD"][tokens] + weights["position_PD"][: len(tokens)]
    for index in range(num_layers):
        w = _layer(weights, index)
        h = layer_norm(x, w["attention_norm.scale_D"], w["attention_norm.bias_D"])
        for head in range(w["attention.k_DKC"].shape[1]):
            q = h @ w["attention.q_DKGC"][:, head, 0] + w["attention.q_bias_KGC"][head, 0]
            k = h @ w["attention.k_DKC"][:, head] + w["attention.k_bias_KC"][head]
            v = h @ w["attention.v_DKC"][:, head] + w["attention.v_bias_KC"][head]
            x = x + _causal_heads(q, k, v) @ w["attention.out_KGCD"][head, 0]
        x = x + w["attention.out_bias_D"]
        h = layer_norm(x, w["mlp_norm.scale_D"], w["mlp_norm.bias_D"])
        h = gelu(h @ w["mlp.up_DF"] + w["mlp.up_bias_F"])
        x = x + h @ w["mlp.out_FD"] + w["mlp.out_bias_D"]
    x = layer_norm(x, weights["final_norm.scale_D"], weights["final_norm.bias_D"])
    return x @ weights["embedding.table_VD"].T


def llama(
    weights: dict[str, np.ndarray], tokens: np.ndarray, num_layers: int, theta: float = 10_000.0
) -> np.ndarray:
    """Returns logits [T, V] (Touvron et al. 2023, section 2.2; grouped heads of Llama 2)."""

    def rms_norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def rope(x):
        # As complex numbers (Su et al. 2021, equation 12): element i pairs with i + C / 2.
        half = x.shape[-1] // 2
        angles = np.outer(np.arange(len(x)), theta ** (-np.arange(half) / half))
        turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = weights["embedding.table_VD"][tokens]
    for index in range(num_layers):
        w = _layer(weights, index)
        h = rms_norm(x, w["attention_norm.scale_D"])
        _, num_kv_heads, group, _ = w["attention.q_DKGC"].shape
        for kv_head in range(num_kv_heads):
            k = rope(h @ w["attention.k_DKC"][:, kv_head])
            v = h @ w["attention.v_DKC"][:, kv_head]
            for member in range(group):
                q = rope(h @ w["attention.q_DKGC"][:, kv_head, member])
                x = x + _causal_heads(q, k, v) @ w["attention.out_KGCD"][kv_head, member]
        h = rms_norm(x, w["mlp_norm.scale_D"])
        gate = h @ w["mlp.gate_DF"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp.up_DF"])) @ w["mlp.out_FD"]
    x = rms_norm(x, weights["final_norm.scale_D"])
    head = weights["head_DV"] if "head_DV" in weights else weights["embedding.table_VD"].T
    return x @ head
