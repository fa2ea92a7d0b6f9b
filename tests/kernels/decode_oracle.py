"""Attention to a cache by its definition, in numpy float64: one query of one head at a time."""

import dataclasses

import numpy as np

from tests.kernels import attention_oracle


@dataclasses.dataclass
class Case:
    """All arguments by the names of `op.attention`, numbers in float64, keys and values by slot."""

    q_BTKGC: np.ndarray
    k_BSKC: np.ndarray
    v_BSKC: np.ndarray
    lengths_B: np.ndarray
    starts_B: np.ndarray
    scale: float = 0.6
    window: int | None = None
    softcap: float | None = None
    slopes_KG: np.ndarray | None = None
    sinks_KG: np.ndarray | None = None
    table_KGU: np.ndarray | None = None
    is_causal: bool = True
    max_distance: int = 9
    is_bidirectional: bool = False


def seen(case: Case, b: int, i: int) -> np.ndarray:
    """Returns the slots that query i of row b sees."""
    own = int(case.lengths_B[b]) - (case.q_BTKGC.shape[1] - i if case.is_causal else 1)
    first = int(case.starts_B[b])
    if case.window is not None:
        first = max(first, own - case.window + 1)
    return np.arange(first, own + 1)


def attention(case: Case) -> np.ndarray:
    """Returns [B, T, K, G, C] in float64, C of the values."""
    B, T, K, G, _ = case.q_BTKGC.shape
    y = np.zeros((B, T, K, G, case.v_BSKC.shape[-1]))
    for b, i, kv, g in np.ndindex(B, T, K, G):
        slots = seen(case, b, i)
        if not len(slots):
            continue
        scores = case.k_BSKC[b, slots, kv] @ case.q_BTKGC[b, i, kv, g] * case.scale
        if case.softcap is not None:
            scores = case.softcap * np.tanh(scores / case.softcap)
        if case.slopes_KG is not None:
            scores = scores - case.slopes_KG[kv, g] * (slots[-1] - slots)
        if case.table_KGU is not None:
            scores = scores + case.table_KGU[kv, g, _buckets(case, slots[-1] - slots)]
        sink = -np.inf if case.sinks_KG is None else case.sinks_KG[kv, g]
        top = max(scores.max(), sink)
        weights = np.exp(scores - top)
        y[b, i, kv, g] = weights @ case.v_BSKC[b, slots, kv] / (weights.sum() + np.exp(sink - top))
    return y


def _buckets(case: Case, distances: np.ndarray) -> list[int]:
    how = case.table_KGU.shape[-1], case.max_distance, case.is_bidirectional
    return [attention_oracle.t5_bucket(int(distance), *how) for distance in distances]
