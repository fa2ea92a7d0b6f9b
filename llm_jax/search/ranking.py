"""How well a search finds the document that belongs to each query.

Each query has one document that is right. Its rank, from 1, is how many others score above it, and one
more; of those that score the same half are taken to be above it, so that a model that gives one vector to all
is no better than chance.
"""

from collections.abc import Sequence

import numpy as np

_BLOCK = 1024  # queries scored at a time


def ranks(queries_ND: np.ndarray, documents_MD: np.ndarray, right_N: np.ndarray) -> np.ndarray:
    """Returns the rank of the right document of each query, float64 [N].

    Args:
      queries_ND, documents_MD: float32, of unit length.
      right_N: int, which document is right.
    """
    found = []
    for start in range(0, len(queries_ND), _BLOCK):
        scores_BM = queries_ND[start : start + _BLOCK] @ documents_MD.T
        own_B1 = np.take_along_axis(scores_BM, right_N[start : start + _BLOCK, None], axis=1)
        above_B = np.sum(scores_BM > own_B1, axis=1)
        same_B = np.sum(scores_BM == own_B1, axis=1) - 1
        found.append(1.0 + above_B + same_B / 2)
    return np.concatenate(found) if found else np.zeros(0)


def firsts(queries_ND: np.ndarray, documents_MD: np.ndarray) -> np.ndarray:
    """Returns which document scores highest for each query, int [N]; of equals the one that comes first."""
    blocks = range(0, len(queries_ND), _BLOCK)
    found = [np.argmax(queries_ND[i : i + _BLOCK] @ documents_MD.T, axis=1) for i in blocks]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def scores(ranks_N: np.ndarray, cutoffs: Sequence[int] = (1, 5, 10)) -> dict[str, np.ndarray]:
    """Returns what each query contributes to each score, float64 [N]: their means are the scores.

    `recall@k`: whether the right document is among the first k. `mrr@k`: the reciprocal of its rank, 0
    beyond the last cutoff (Craswell 2009). `ndcg@k`: 1 / log2(1 + rank) there, as a single document is
    right (Järvelin and Kekäläinen 2002).
    """
    last = max(cutoffs)
    is_in = ranks_N <= last
    found = {f"recall@{k}": (ranks_N <= k).astype(np.float64) for k in cutoffs}
    found[f"mrr@{last}"] = np.where(is_in, 1.0 / ranks_N, 0.0)
    found[f"ndcg@{last}"] = np.where(is_in, 1.0 / np.log2(1.0 + ranks_N), 0.0)
    return found
