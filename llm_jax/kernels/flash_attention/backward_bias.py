"""Biases in the backward kernel: what a tile adds to its scores, and the sums for a bias' gradient.

Of a table, a tile's gradient with respect to its bias is that of its scores. It is added to a sum of
the same shape for each of the tiles that occur, and when a head is done these are summed along their
diagonals.

Where a table is flat from some distance on, an open tile is flat but for its corners next to the
diagonal: these alone are added to, the rest is one number that goes to the logsumexp, and all that the
gradient needs of the rest is its sum.
"""

from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import diagonals


class WholeTile:
    """A bias that is added to every score of a tile."""

    def __init__(
        self, refs: dict[str, Any], index: int, term: diagonals.Diagonals, q_start, k_start
    ):
        self.tiles, self.sums = refs[f"bias_tiles_{index}"], refs.get(f"bias_sums_{index}")
        self.term = term
        self.nearest, self.steps_past = term.place(q_start, k_start)

    def added(self, s_ST: jax.Array, lse_1T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns scores and logsumexp whose difference has the bias in it."""
        if self.term.slopes_H is not None:
            lse_1T = lse_1T - self.term.shift(self.steps_past)
        return s_ST + self.tiles[self.nearest], lse_1T

    def collect(self, ds_ST: jax.Array) -> None:
        self.sums[self.nearest] += ds_ST


class Corners:
    """A bias that is flat but for two corners, each a tile of its own."""

    def __init__(
        self, refs: dict[str, Any], index: int, term: diagonals.Diagonals, q_start, k_start, shape
    ):
        self.tiles, self.sums = refs[f"bias_tiles_{index}"], refs.get(f"bias_sums_{index}")
        self.size, (num_keys, num_queries) = term.num_keys, shape
        # The first queries with the last keys, which come just before them; and the other way round.
        self.back, steps = term.place(q_start, k_start + num_keys - self.size)
        self.ahead, _ = term.place(q_start + num_queries - self.size, k_start)
        # Of two corners the one that is further away from the diagonal is flat, as the middle is.
        is_back = steps + self.back + term.first >= 0
        self.flat = jnp.where(is_back, self.ahead, self.back)
        self.has_ahead = not term.is_past

    def _cut(self, x_ST: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the corners behind and ahead."""
        size = self.size
        return x_ST[-size:, :size], x_ST[:size, -size:]

    def added(self, s_ST: jax.Array, lse_1T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns scores and logsumexp whose difference has the bias in it."""
        size, flat_11 = self.size, self.tiles[self.flat, :1, :1]
        back, ahead = self._cut(s_ST)
        first, last = s_ST[:size], s_ST[-size:]
        last = jnp.concatenate([back + (self.tiles[self.back] - flat_11), last[:, size:]], axis=1)
        if self.has_ahead:
            ahead += self.tiles[self.ahead] - flat_11
            first = jnp.concatenate([first[:, :-size], ahead], axis=1)
        rows = [first, s_ST[size:-size], last]
        s_ST = jnp.concatenate([x for x in rows if len(x)], axis=0)
        return s_ST, lse_1T - flat_11

    def collect(self, ds_ST: jax.Array) -> None:
        size = self.size
        total_1T = jnp.sum(ds_ST, axis=0, keepdims=True)
        pieces = [total_1T[:, n : n + size] for n in range(0, total_1T.shape[1], size)]
        back, ahead = self._cut(ds_ST)
        pieces.append(-jnp.sum(back, axis=0, keepdims=True))
        self.sums[self.back] += back
        if self.has_ahead:
            pieces.append(-jnp.sum(ahead, axis=0, keepdims=True))
            self.sums[self.ahead] += ahead
        # To any row of a flat tile: all of its distances share a bucket.
        self.sums[self.flat, :1] += sum(pieces)


class Array:
    """A block of a full array, [queries, keys]; its gradient's sum is in pieces [keys, queries]."""

    def __init__(self, refs: dict[str, Any], name: str, i, j, units: tuple[int, int], shape):
        self.ref, self.sums = refs[name], refs.get("bias_sums")
        (unit_q, unit_k), (num_keys, num_queries) = units, shape
        self.i, self.unit_q, self.num_pieces = i, unit_q, num_queries // unit_q
        self.at_q = pl.ds(pl.multiple_of(i * unit_q, unit_q), num_queries)
        self.at_k = pl.ds(pl.multiple_of(j * unit_k, unit_k), num_keys)

    def added(self, s_ST: jax.Array, lse_1T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns scores and logsumexp whose difference has the bias in it."""
        return s_ST + diagonals.transposed(self.ref[self.at_q, self.at_k]), lse_1T

    def collect(self, ds_ST: jax.Array) -> None:
        for n in range(self.num_pieces):
            of_piece = ds_ST[:, n * self.unit_q : (n + 1) * self.unit_q]
            self.sums[self.i + n, self.at_k, :] += of_piece


def load_array(refs: dict[str, Any], is_first) -> None:
    """Clears the sum of a block of a full array's gradient."""

    @pl.when(is_first)
    def _():
        refs["bias_sums"][...] = jnp.zeros_like(refs["bias_sums"])


def store_array(refs: dict[str, Any], is_last) -> None:
    """Writes the block of the gradient, [queries, keys]."""
    sums, out = refs["bias_sums"], refs["dbias"]
    unit = sums.shape[2]

    @pl.when(is_last)
    def _():
        for n in range(len(sums)):
            out[n * unit : (n + 1) * unit, :] = sums[n].T.astype(out.dtype)


def load(terms: tuple[diagonals.Diagonals, ...], refs: dict[str, Any], is_fresh, is_first) -> None:
    """Makes the tiles of a head where `is_fresh`, and clears its sums, those of all heads `is_first`."""

    @pl.when(is_fresh)
    def _():
        for index, term in enumerate(terms):
            term.fill(refs[f"bias_tiles_{index}"], refs[term.values_HNX])
            if f"bias_sums_{index}" in refs:
                sums = refs[f"bias_sums_{index}"]
                sums[...] = jnp.zeros_like(sums)

    if "dbias_0" in refs:

        @pl.when(is_first)
        def _():
            for index in range(len(terms)):
                found = refs[f"dbias_{index}"]
                found[...] = jnp.zeros_like(found)


def store(terms: tuple[diagonals.Diagonals, ...], refs: dict[str, Any], g: jax.Array) -> None:
    """Adds the sums along the diagonals to what head `g` of the group has."""
    for index, term in enumerate(terms):
        for n in range(term.count):
            refs[f"dbias_{index}"][g, n] += diagonals.summed(refs[f"bias_sums_{index}"][n])
