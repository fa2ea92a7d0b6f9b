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


def _causal_head(q, k, v, slope=0.0, softcap=math.inf, window=math.inf):
    """One head, one query at a time: q, k, v are [T, C]."""
    length, width = q.shape
    y = np.zeros_like(q)
    for t in range(length):
        seen = np.array([s for s in range(t + 1) if t - s < window])
        scores = k[seen] @ q[t] / math.sqrt(width)
        if softcap < math.inf:
            scores = softcap * np.tanh(scores / softcap)
        y[t] = softmax(scores - slope * (t - seen)) @ v[seen]
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
            x = x + _causal_head(q, k, v) @ w["attention.out_KGCD"][head, 0]
        x = x + w["attention.out_bias_D"]
        h = layer_norm(x, w["mlp_norm.scale_D"], w["mlp_norm.bias_D"])
        h = gelu(h @ w["mlp.up_DF"] + w["mlp.up_bias_F"])
        x = x + h @ w["mlp.out_FD"] + w["mlp.out_bias_D"]
    x = layer_norm(x, weights["final_norm.scale_D"], weights["final_norm.bias_D"])
    return x @ weights["embedding.table_VD"].T


def llama(
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    num_layers: int,
    *,
    theta: float = 10_000.0,
    rotated: int | None = None,
    slopes: list[float] | None = None,
    **attention,
) -> np.ndarray:
    """Returns logits [T, V] (Touvron et al. 2023, section 2.2; grouped heads of Llama 2).

    Args:
      weights: with norms of queries and keys, heads are normalised (Dehghani et al. 2023); without
        a final norm, norms come after the sum (Vaswani et al. 2017).
      tokens, num_layers, theta: of the model.
      rotated: elements of each head that RoPE turns; None for all of them.
      slopes: of ALiBi (Press et al. 2022), one a head.
      **attention: `softcap` and `window`.
    """
    is_post_norm = "final_norm.scale_D" not in weights

    def rms_norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def rope(x):
        # As complex numbers (Su et al. 2021, equation 12): element i pairs with i + half.
        half = (x.shape[-1] if rotated is None else rotated) // 2
        if not half:
            return x
        angles = np.outer(np.arange(len(x)), theta ** (-np.arange(half) / half))
        turned = (x[:, :half] + 1j * x[:, half : 2 * half]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag, x[:, 2 * half :]], axis=-1)

    x = weights["embedding.table_VD"][tokens]
    for index in range(num_layers):
        w = _layer(weights, index)

        def head(matrix, norm):
            projected = h @ matrix  # noqa: B023
            scale = w[norm] if norm in w else None  # noqa: B023
            return rope(projected if scale is None else rms_norm(projected, scale))

        h = x if is_post_norm else rms_norm(x, w["attention_norm.scale_D"])
        _, num_kv_heads, group, _ = w["attention.q_DKGC"].shape
        for kv_head, member in np.ndindex(num_kv_heads, group):
            q = head(w["attention.q_DKGC"][:, kv_head, member], "attention.q_norm.scale_C")
            k = head(w["attention.k_DKC"][:, kv_head], "attention.k_norm.scale_C")
            v = h @ w["attention.v_DKC"][:, kv_head]
            slope = 0.0 if slopes is None else slopes[kv_head * group + member]
            y = _causal_head(q, k, v, slope, **attention)
            x = x + y @ w["attention.out_KGCD"][kv_head, member]
        if is_post_norm:
            x = rms_norm(x, w["attention_norm.scale_D"])
        h = x if is_post_norm else rms_norm(x, w["mlp_norm.scale_D"])
        gate = h @ w["mlp.gate_DF"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp.up_DF"])) @ w["mlp.out_FD"]
        if is_post_norm:
            x = rms_norm(x, w["mlp_norm.scale_D"])
    if not is_post_norm:
        x = rms_norm(x, weights["final_norm.scale_D"])
    return x @ (weights["head_DV"] if "head_DV" in weights else weights["embedding.table_VD"].T)


def latent_llama(
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    num_layers: int,
    *,
    frequencies: np.ndarray | None = None,
    factor: float = 1.0,
    is_interleaved: bool = False,
) -> np.ndarray:
    """Returns logits [T, V] of a Llama with multi-head latent attention.

    Head by head, from the equations of DeepSeek-V2, section 2.1 (appendix C has them all).

    Args:
      weights, tokens, num_layers: of the model.
      frequencies: of the rotated pairs; None: those of RoPE at a base of 10,000.
      factor: of rotated elements (YaRN).
      is_interleaved: whether pairs are neighbours.
    """

    def rms_norm(x, scale, epsilon):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale

    def rope(x):
        half = x.shape[-1] // 2
        turns = 10_000.0 ** (-np.arange(half) / half) if frequencies is None else frequencies
        angles = np.outer(np.arange(len(x)), turns)
        pairs = x[:, 0::2] + 1j * x[:, 1::2] if is_interleaved else x[:, :half] + 1j * x[:, half:]
        turned = factor * pairs * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = weights["embedding.table_VD"][tokens]
    for index in range(num_layers):
        w = _layer(weights, index)
        h = rms_norm(x, w["attention_norm.scale_D"], 1e-5)
        c = rms_norm(h @ w["attention.latent_DZ"], w["attention.latent_norm.scale_Z"], 1e-6)
        k_rope = rope(h @ w["attention.k_rope_DC"])
        queries, letter = h, "D"
        if "attention.q_latent_DZ" in w:
            scale = w["attention.q_latent_norm.scale_Z"]
            queries, letter = rms_norm(h @ w["attention.q_latent_DZ"], scale, 1e-6), "Z"
        for head in range(w["attention.k_ZHC"].shape[1]):
            q = queries @ w[f"attention.q_{letter}HC"][:, head]
            q_rope = rope(queries @ w[f"attention.q_rope_{letter}HC"][:, head])
            k, v = c @ w["attention.k_ZHC"][:, head], c @ w["attention.v_ZHC"][:, head]
            q, k = np.concatenate([q, q_rope], -1), np.concatenate([k, k_rope], -1)
            y = np.zeros_like(v)
            for t in range(len(x)):
                y[t] = softmax(k[: t + 1] @ q[t] / math.sqrt(q.shape[-1])) @ v[: t + 1]
            x = x + y @ w["attention.out_HCD"][head]
        h = rms_norm(x, w["mlp_norm.scale_D"], 1e-5)
        gate = h @ w["mlp.gate_DF"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp.up_DF"])) @ w["mlp.out_FD"]
    return rms_norm(x, weights["final_norm.scale_D"], 1e-5) @ weights["embedding.table_VD"].T
