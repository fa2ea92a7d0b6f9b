"""Attention by its definition, in numpy float64: one query of one head at a time."""

import dataclasses
from typing import Any

import jax
import numpy as np

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import masks


def is_allowed(mask: masks.Mask, b: int, i: int, j: int, t: int, s: int) -> bool:
    """Returns whether query `i` of row `b`, at slot `t`, may see key `j`, at slot `s`."""
    if isinstance(mask, masks.And):
        return is_allowed(mask.one, b, i, j, t, s) and is_allowed(mask.other, b, i, j, t, s)
    if isinstance(mask, masks.Or):
        return is_allowed(mask.one, b, i, j, t, s) or is_allowed(mask.other, b, i, j, t, s)
    if isinstance(mask, masks.Not):
        return not is_allowed(mask.one, b, i, j, t, s)
    if isinstance(mask, masks.Band):
        is_near = mask.left is None or t - s <= mask.left
        return is_near and (mask.right is None or s - t <= mask.right)
    if isinstance(mask, masks.KeysBelow):
        return s < int(mask.lengths_B[b])
    if isinstance(mask, masks.QueriesBelow):
        return t < int(mask.lengths_B[b])
    assert isinstance(mask, masks.Segments)
    return int(mask.q_ids_BT[b, i]) == int(mask.k_ids_BS[b, j])


def allowed(mask: masks.Mask, B: int, T: int, S: int, q_offset: int = 0) -> np.ndarray:
    """Returns the Booleans [B, T, S] of a mask, pair by pair."""
    return np.asarray(
        [
            [[is_allowed(mask, b, i, j, q_offset + i, j) for j in range(S)] for i in range(T)]
            for b in range(B)
        ]
    )


def t5_bucket(distance: int, num_buckets: int, max_distance: int, is_bidirectional: bool) -> int:
    """The bucket of query slot minus key slot, by the words of the paper's section 2.1."""
    first = 0
    if is_bidirectional:
        num_buckets //= 2
        first = num_buckets if distance < 0 else 0
        distance = abs(distance)
    distance = max(distance, 0)
    num_exact = num_buckets // 2
    if distance < num_exact:
        return first + distance
    fraction = np.log(distance / num_exact) / np.log(max_distance / num_exact)
    return first + min(num_exact + int(fraction * (num_buckets - num_exact)), num_buckets - 1)


@dataclasses.dataclass
class Case:
    """All arguments of an attention, arrays in float64, by the names of `reference.attention`."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: masks.Mask
    scale: float = 0.6
    q_offset: int = 0
    softcap: float | None = None
    bias: biases.Bias | None = None
    sinks_KG: np.ndarray | None = None
    factors_BKGTS: np.ndarray | None = None


def _bias(bias: biases.Bias | None, b: int, kv: int, g: int, i: int, t: int, j: int) -> float:
    if bias is None:
        return 0.0
    if isinstance(bias, biases.Alibi):
        return -bias.slopes_KG[kv, g] * abs(t - j)
    if isinstance(bias, biases.Relative):
        buckets = bias.table_KGU.shape[-1]
        bucket = t5_bucket(t - j, buckets, bias.max_distance, bias.is_bidirectional)
        return bias.table_KGU[kv, g, bucket]
    array = bias.bias_BKGTS
    index = (min(b, array.shape[0] - 1), min(kv, array.shape[1] - 1), min(g, array.shape[2] - 1))
    return array[(*index, i, j)]


def attention(case: Case) -> np.ndarray:
    """Returns [B, T, K, G, Cv] in float64."""
    B, T, K, G, _ = case.q.shape
    S = case.k.shape[1]
    seen_BTS = allowed(case.mask, B, T, S, case.q_offset)
    y = np.zeros((B, T, K, G, case.v.shape[-1]))
    for b, i, kv, g in np.ndindex(B, T, K, G):
        seen = np.flatnonzero(seen_BTS[b, i])
        if not len(seen):
            continue
        scores = case.k[b, seen, kv] @ case.q[b, i, kv, g] * case.scale
        if case.softcap is not None:
            scores = case.softcap * np.tanh(scores / case.softcap)
        t = case.q_offset + i
        scores = scores + [_bias(case.bias, b, kv, g, i, t, int(j)) for j in seen]
        sink = -np.inf if case.sinks_KG is None else case.sinks_KG[kv, g]
        top = max(scores.max(), sink)
        weights = np.exp(scores - top)
        weights = weights / (weights.sum() + np.exp(sink - top))
        if case.factors_BKGTS is not None:
            weights = weights * case.factors_BKGTS[b, kv, g, i, seen]
        y[b, i, kv, g] = weights @ case.v[b, seen, kv]
    return y


def parameters(case: Case) -> dict[str, Any]:
    """Returns what has a gradient, by field."""
    return {
        name: getattr(case, name)
        for name in ("q", "k", "v", "bias", "sinks_KG")
        if getattr(case, name) is not None
    }


def slope(case: Case, name: str, direction: Any, probe: np.ndarray, step: float = 1e-5) -> float:
    """Returns the derivative of `vdot(attention, probe)` along a direction of one argument."""

    def value(sign: float) -> float:
        at = jax.tree.map(lambda x, d: x + sign * step * d, getattr(case, name), direction)
        return np.vdot(attention(dataclasses.replace(case, **{name: at})), probe)

    return (value(1.0) - value(-1.0)) / (2 * step)
