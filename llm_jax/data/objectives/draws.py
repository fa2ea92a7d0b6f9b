"""Random numbers as a function of (seed, row): what lets any step be made without those before it.

Philox (Salmon et al. 2011) is a cipher of a counter: the counter holds the row, the key the seed.
Its raw words are turned into numbers here, as NumPy promises to keep those words alone.
"""

import dataclasses

import numpy as np

TRAIN, EVAL = 0, 1  # what rows are drawn for: one seed gives each its own numbers


@dataclasses.dataclass(frozen=True)
class Draws:
    """A source of numbers.

    Attributes:
      seed: of the run; evaluation keeps to one of its own, so that it is the same each time.
      purpose: TRAIN or EVAL.
    """

    seed: int
    purpose: int = TRAIN

    def uniform(self, rows: np.ndarray, count: int, stream: int = 0) -> np.ndarray:
        """Returns float64 numbers in [0, 1), [B, count].

        Args:
          rows: int64 [B], global numbers of rows, which count on through steps and epochs.
          count: numbers of a row. Those of a smaller count are the first ones of a larger.
          stream: each has other numbers.
        """
        words = np.empty((len(rows), count), np.uint64)
        for index, row in enumerate(rows):
            # The first word counts the numbers of a row.
            counter = np.array([0, stream, row, 0], np.uint64)
            cipher = np.random.Philox(key=(self.seed, self.purpose), counter=counter)
            words[index] = cipher.random_raw(count)
        return (words >> np.uint64(11)) * 2.0**-53


EVALUATION = Draws(0, EVAL)
