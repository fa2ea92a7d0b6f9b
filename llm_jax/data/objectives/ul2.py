"""UL2's mixture of denoisers (Tay et al. 2022, section 3.1): R, S and X, each with its mode token.

R is T5's span corruption, S a prefix with the rest to be given, X spans that are long or many. Each
window has one of the seven, in equal shares, in all of its documents. Windows are as long as the
denoiser with the longest rows allows, so the rows of the others end with padding.
"""

import math

import numpy as np

from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data.objectives import draws as draws_lib
from llm_jax.data.objectives import span_corruption

MODES = ("[R]", "[S]", "[X]")

# Mode, density and mean length of spans: the paper's table 1.
DENOISERS = (
    ("[R]", 0.15, 3.0),
    ("[R]", 0.15, 8.0),
    ("[S]", 0.25, math.inf),
    ("[X]", 0.5, 3.0),
    ("[X]", 0.5, 8.0),
    ("[X]", 0.15, 64.0),
    ("[X]", 0.5, 64.0),
)


class MixtureOfDenoisers(span_corruption.SpanCorruption):
    """Span corruption of seven kinds."""

    def _make_noises(self, tokenizer: tokenizer_lib.Tokenizer) -> list[span_corruption.Noise]:
        special = tokenizer.special_tokens
        return [
            span_corruption.Noise(density, mean_length, special[mode])
            for mode, density, mean_length in DENOISERS
        ]

    def kinds(self, rows: np.ndarray, draws: draws_lib.Draws) -> np.ndarray:
        uniform = draws.uniform(rows, 1, stream=0)[:, 0]
        return (uniform * len(DENOISERS)).astype(np.int64)
