"""The longest parts of a text that occur in another, exactly, by a suffix array (Manber and Myers 1993).

Suffixes are sorted by prefix doubling: n log n for a sort, once for each power of two up to the longest match
that is looked for. A long text is taken in pieces that overlap, so memory does not grow with it: some 48 bytes
for each of `PIECE` tokens, 200 MB; a piece takes some 3 s on a core.
"""

import numpy as np

PIECE = 1 << 22  # tokens of a suffix array
_BLOCK = 4096  # places of a query that are looked up at a time
_END, _NOTHING = -1, -2  # behind a text, and behind a query: they match nothing


def suffix_array(tokens_N: np.ndarray, depth: int) -> np.ndarray:
    """Returns the places of a text in the order of what begins there, int64 [N].

    Args:
      tokens_N: ids, not negative.
      depth: tokens that the order goes by, at least; places that agree in all of them lie beside each other.
    """
    _, ranks_N = np.unique(tokens_N, return_inverse=True)
    ranks_N = ranks_N.astype(np.int64) + 1
    size, known = len(ranks_N), 1
    order_N = np.argsort(ranks_N, kind="stable")
    while known < depth and ranks_N.max() < size:
        # What begins at a place, by its first `known` tokens and the as many behind them; 0: the text ends.
        keys_N = ranks_N * (size + 1)
        keys_N[:-known] += ranks_N[known:]
        order_N = np.argsort(keys_N, kind="stable")
        sorted_N = keys_N[order_N]
        ranks_N = np.empty_like(keys_N)
        ranks_N[order_N] = np.cumsum(np.r_[True, sorted_N[1:] != sorted_N[:-1]])
        known *= 2
    return order_N


def longest_matches(
    queries: list[np.ndarray], tokens_N: np.ndarray, longest: int
) -> list[np.ndarray]:
    """Returns for each place of each query how many tokens from there on occur somewhere in a text.

    Args:
      queries: ids, of any lengths.
      tokens_N: the text, an array or a memory map.
      longest: longer matches count as this.

    Returns:
      int64, in the shapes of the queries.
    """
    size = max((len(query) for query in queries), default=0)
    if size == 0:
        return [np.zeros(0, np.int64) for _ in queries]
    longest = min(longest, size)
    rows = np.concatenate([_windows(query, longest) for query in queries])
    best_M = np.zeros(len(rows), np.int64)
    for start in range(0, len(tokens_N), PIECE):
        # A match that begins in this piece may end in the next.
        piece_N = np.asarray(tokens_N[start : start + PIECE + longest], np.int64)
        order_N = suffix_array(piece_N, longest)
        padded_N = np.append(piece_N, np.full(longest, _END, np.int64))
        for first in range(0, len(rows), _BLOCK):
            block = slice(first, first + _BLOCK)
            found_M = _look_up(rows[block], order_N, padded_N)
            best_M[block] = np.maximum(best_M[block], found_M)
    return np.split(best_M, np.cumsum([len(query) for query in queries])[:-1])


def _windows(query_M: np.ndarray, length: int) -> np.ndarray:
    """Returns the tokens from each place on, int64 [M, length], nothing behind the last."""
    padded_M = np.append(np.asarray(query_M, np.int64), np.full(length, _NOTHING, np.int64))
    return np.lib.stride_tricks.sliding_window_view(padded_M, length)[: len(query_M)]


def _look_up(rows_MS: np.ndarray, order_N: np.ndarray, padded_N: np.ndarray) -> np.ndarray:
    """Returns how many tokens each row shares with the suffix that shares most with it, int64 [M].

    A row's neighbours in the order of suffixes share most.
    """
    reach = np.arange(rows_MS.shape[1])

    def compared(places_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        suffixes_MS = padded_N[order_N[places_M][:, None] + reach]
        differs_MS = suffixes_MS != rows_MS
        shared_M = np.where(differs_MS.any(1), differs_MS.argmax(1), len(reach))
        at_M = np.minimum(shared_M, len(reach) - 1)[:, None]
        is_before_M = np.take_along_axis(suffixes_MS, at_M, 1) < np.take_along_axis(
            rows_MS, at_M, 1
        )
        return shared_M, is_before_M[:, 0]

    # By bisection, of how many suffixes each row comes after.
    low_M, high_M = (np.full(len(rows_MS), end, np.int64) for end in (0, len(order_N)))
    while np.any(low_M < high_M):
        middle_M = (low_M + high_M) // 2
        _, is_before_M = compared(np.minimum(middle_M, len(order_N) - 1))
        is_open_M = low_M < high_M
        low_M = np.where(is_open_M & is_before_M, middle_M + 1, low_M)
        high_M = np.where(is_open_M & ~is_before_M, middle_M, high_M)
    before_M, _ = compared(np.maximum(low_M - 1, 0))
    behind_M, _ = compared(np.minimum(low_M, len(order_N) - 1))
    return np.maximum(before_M, behind_M)
