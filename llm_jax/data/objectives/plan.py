"""Which examples share a row: a function of their lengths alone."""

import operator

import numpy as np

# Rows that are open at a time. More would fill rows a little better, and take longer to look through.
_NUM_OPEN = 32


def first_fit(lengths: np.ndarray, capacities: tuple[int, ...]) -> np.ndarray:
    """Returns the row of each example, int64 [N]: the first open one with room, or a new one.

    Args:
      lengths: int64 [N, K], tokens of each example in each of K sequences (encoder and decoder).
      capacities: tokens that a row has in each.

    The examples of a row are in their order, and rows in that of their first examples.
    """
    rows = np.empty(len(lengths), np.int64)
    open_rows: list[tuple[int, list[int]]] = []  # its number, and the room that is left
    num_rows = 0
    for index, wanted in enumerate(lengths.tolist()):
        fitting = (row for row in open_rows if all(map(operator.le, wanted, row[1])))
        row = next(fitting, None)
        if row is None:
            row = (num_rows, list(capacities))
            num_rows += 1
            open_rows.append(row)
            if len(open_rows) > _NUM_OPEN:
                open_rows.pop(0)
        rows[index], room = row
        for sequence, need in enumerate(wanted):
            room[sequence] -= need
    return rows
