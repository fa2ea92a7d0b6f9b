"""Beam search by its definition: one row, hypotheses as Python lists, the model as a function."""

from collections.abc import Callable
import itertools

import numpy as np

Hypothesis = tuple[float, tuple[int, ...]]  # score or sum, and tokens


def search(
    next_log_probs: Callable[[tuple[int, ...]], np.ndarray],
    *,
    num_beams: int,
    length_penalty: float,
    early_stopping: bool | str,
    eos_id: int,
    max_tokens: int,
) -> list[Hypothesis]:
    """Returns scores and tokens of the best hypotheses, the end among the tokens."""
    running: list[Hypothesis] = [(0.0, ())]
    finished: list[Hypothesis] = []
    for length in range(1, max_tokens + 1):
        candidates = _best(_continued(running, next_log_probs), 2 * num_beams)
        ends = [t[-1] == eos_id or length == max_tokens for _, t in candidates]
        scored = [(s / length**length_penalty, t) for s, t in candidates]
        ended = [x for x, is_end in zip(scored[:num_beams], ends) if is_end]
        finished = _best(finished + ended, num_beams)
        running = [x for x, is_end in zip(candidates, ends) if not is_end][:num_beams]
        if length == max_tokens or len(finished) < num_beams:
            continue
        if early_stopping is True:
            break
        is_rising = early_stopping == "never" and length_penalty > 0
        best_length = max_tokens if is_rising else length
        if running[0][0] / best_length**length_penalty <= finished[-1][0]:
            break
    return finished


def best_of_all(
    next_log_probs: Callable[[tuple[int, ...]], np.ndarray], *, num_ids: int, max_tokens: int
) -> Hypothesis:
    """Returns the most probable of all texts of so many tokens, which nothing ends."""
    texts = itertools.product(range(num_ids), repeat=max_tokens)
    return max((_sum(next_log_probs, text), text) for text in texts)


def _sum(next_log_probs, text: tuple[int, ...]) -> float:
    return sum(float(next_log_probs(text[:i])[token]) for i, token in enumerate(text))


def _continued(running: list[Hypothesis], next_log_probs) -> list[Hypothesis]:
    return [
        (total + float(log_prob), (*tokens, token))
        for total, tokens in running
        for token, log_prob in enumerate(next_log_probs(tokens))
    ]


def _best(hypotheses: list[Hypothesis], count: int) -> list[Hypothesis]:
    return sorted(hypotheses, key=lambda x: -x[0])[:count]
