"""Biases by distance in the kernels: tiles that are constant along their diagonals.

A tile of scores begins at one difference of slots between its first query and its first key. These
differences lie on a grid, and beyond some distance a bias is flat (a table's last bucket) or falls by
the same amount a slot (a slope). So a handful of tiles are all that occur, up to a number for a whole
tile, and that number is taken from the maximum or the logsumexp and not added to scores. A kernel makes
the tiles when it comes to a head, from a vector of distances, and a visit adds the one it needs.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
from jax import lax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import masks

LOG2E = math.log2(math.e)
# Rows of a register: a tile's diagonals are summed in the kernel down to so many, then outside.
_ROWS = 8
_LANES = 128


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagonals:
    """A bias by distance for tiles of one shape, to the base 2.

    Tile `n` is that of queries which begin `step * (first + n)`, and what `q_offset` is past a multiple
    of `step`, after its keys.

    Attributes:
      values_HNX: float32; value `x` of tile `n` is of the distance `x - num_keys` between query and key
        from there.
      slopes_H: what a slot more of distance adds beyond the outermost tiles, float32; None for nothing.
      is_past: no query sees a key after it, so there are no tiles for those.
      offset_steps: whole steps in `q_offset`, int32 scalar; None where it is `static_steps`.
    """

    values_HNX: Any
    slopes_H: Any
    offset_steps: Any
    num_keys: int = _static()
    num_queries: int = _static()
    step: int = _static()
    first: int = _static()
    count: int = _static()
    static_steps: int = _static()
    is_past: bool = _static()

    def place(self, q_start: jax.Array, k_start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the tile for a place in the arrays, and how many steps past it that lies."""
        offset = self.static_steps if self.offset_steps is None else self.offset_steps
        steps = lax.div(q_start - k_start, jnp.int32(self.step)) + (offset - self.first)
        nearest = jnp.clip(steps, 0, self.count - 1)
        return nearest, steps - nearest

    def shift(self, steps_past: jax.Array) -> jax.Array:
        """Returns what the scores of a whole tile lack after its tile was added, float32 scalar."""
        return self.slopes_H * (jnp.abs(steps_past) * self.step).astype(jnp.float32)

    def fill(self, tiles_ref: Any, values_ref: Any) -> None:
        """Makes the tiles of one head from its values [N, X]."""
        for n in range(self.count):
            tiles_ref[n] = tile(values_ref[n : n + 1, :], self.num_queries)

    @property
    def tiles_shape(self) -> tuple[int, int, int]:
        return self.count, self.num_keys, self.num_queries

    @property
    def sums_shape(self) -> tuple[int, int, int]:
        """Of what `summed` returns for all tiles."""
        rows = self.num_keys
        while rows > _ROWS and rows % 2 == 0:
            rows //= 2
        return self.count, rows, self.num_keys + self.num_queries


def _reach(bias: biases.Alibi | biases.Relative) -> tuple[int, int]:
    """Returns the distances, back and ahead of the query, from which on a bias is flat or straight."""
    if isinstance(bias, biases.Alibi):
        return 0, 0
    return bias.max_distance, bias.max_distance if bias.is_bidirectional else 0


def corner(bias: biases.Relative, num_keys: int, num_queries: int) -> int:
    """Returns the rows and columns of a tile's corner that may hold what is not flat."""
    wanted = -(-bias.max_distance // _LANES) * _LANES
    return min(wanted, num_keys // 2, num_queries // 2)


def flat_from(bias: biases.Bias | None, num_keys: int, num_queries: int) -> tuple[int, int] | None:
    """Returns the distances, back and ahead, from which on a tile is flat but for a corner, or None."""
    if not isinstance(bias, biases.Relative):
        return None
    size = corner(bias, num_keys, num_queries)
    return tuple(max(0, reach - size) for reach in _reach(bias))


def _range(
    reach: tuple[int, int], is_past: bool, shape: tuple[int, int], phases: tuple[int, int]
) -> tuple[int, int]:
    """Returns the first and the last step that need a tile of their own.

    Args:
      phases: least and greatest remainder of `q_offset`.
    """
    num_keys, num_queries = shape
    step = math.gcd(*shape)
    back, ahead = reach
    last = -(-(back + num_keys - 1 - phases[0]) // step)
    if is_past:  # before this no query of the tile sees a key of it
        return min(-((num_queries - 1 + phases[1]) // step), last), last
    return (-ahead - num_queries + 1 - phases[1]) // step, last


def most_tiles(bias: biases.Alibi | biases.Relative, num_keys: int, num_queries: int) -> int:
    """Returns the number of tiles that `make` makes at most."""
    shape = num_keys, num_queries
    first, last = _range(_reach(bias), False, shape, (0, math.gcd(*shape) - 1))
    return last - first + 1


def make(
    bias: biases.Alibi | biases.Relative,
    mask: masks.Mask,
    shape: tuple[int, int],
    q_offset: jax.Array | int,
) -> Diagonals:
    """Returns the diagonals of a bias for tiles of `shape`, keys and queries."""
    num_keys, num_queries = shape
    step = math.gcd(*shape)
    is_known = isinstance(q_offset, int)
    phase, steps = q_offset % step, q_offset // step
    phases = (phase, phase) if is_known else (0, step - 1)
    is_past = masks.sees_past_alone(mask)
    first, last = _range(_reach(bias), is_past, shape, phases)
    values_KGNX = bias.by_distance_KGD(_distances(first, last, shape, phase)) * LOG2E
    slopes_H = None
    if isinstance(bias, biases.Alibi):
        slopes_H = bias.slopes_KG.reshape(-1) * -LOG2E
    return Diagonals(
        values_KGNX.reshape(-1, *values_KGNX.shape[2:]),
        slopes_H,
        None if is_known else steps,
        num_keys,
        num_queries,
        step,
        first,
        last - first + 1,
        steps if is_known else 0,
        is_past,
    )


def _distances(first: int, last: int, shape: tuple[int, int], phase: jax.Array | int) -> jax.Array:
    """Returns the distances of `values_HNX`, [N, X]."""
    starts_N = phase + math.gcd(*shape) * jnp.arange(first, last + 1)
    return starts_N[:, None] + jnp.arange(-shape[0], shape[1])


def tile(values_1X: jax.Array, num_queries: int) -> jax.Array:
    """Returns [keys, queries] in which each row is the one above, moved by one."""
    width = values_1X.shape[1]
    num_keys = width - num_queries
    # Rows that lie a register's lanes apart are equal but for whole registers.
    rows = _LANES if num_keys % _LANES == 0 else num_keys
    x_RX = pltpu.roll(jnp.broadcast_to(values_1X, (rows, width)), 0, 1, stride=1, stride_axis=0)
    starts = range(num_keys, 0, -rows)
    return jnp.concatenate([x_RX[:, start : start + num_queries] for start in starts], axis=0)


def transposed(bias_TS: jax.Array) -> jax.Array:
    """Returns a block of a full array as kernels hold scores: [keys, queries], to the base 2."""
    return bias_TS.astype(jnp.float32).T * LOG2E


def summed(x_ST: jax.Array) -> jax.Array:
    """Returns [rows, keys + queries] with the sums along diagonals, a few rows of them.

    Element `x` of row `r` is of queries `x - r - keys` after their keys. Half of the rows at a time,
    moved onto the other half.
    """
    width = sum(x_ST.shape)

    def padded(x):
        zeros = jnp.zeros((len(x), width - x.shape[1]), x.dtype)
        return jnp.concatenate([zeros, x], axis=1) if zeros.size else x

    x = x_ST
    while len(x) > _ROWS and len(x) % 2 == 0:
        half = len(x) // 2
        if half % _LANES == 0:  # by whole registers
            zeros = jnp.zeros((half, half), x.dtype)
            upper = jnp.concatenate([zeros, x[:half]], axis=1)
            x = upper + jnp.concatenate([x[half:], zeros], axis=1)
        else:
            x = padded(x)
            x = x[:half] + pltpu.roll(x[half:], width - half, 1)
    return padded(x)


def gradient(
    bias: biases.Relative,
    sums: Sequence[jax.Array],
    terms: Sequence[Diagonals],
    q_offset: jax.Array | int,
) -> biases.Relative:
    """Returns the gradient of a table from the sums [K, G, *sums_shape] of all tiles."""
    U = bias.table_KGU.shape[-1]
    table_KGU = jnp.zeros_like(bias.table_KGU)
    for term, sums_KGNRX in zip(terms, sums, strict=True):
        N, R, X = term.sums_shape
        after_X = jnp.arange(X) - term.num_keys
        starts_N = q_offset % term.step + term.step * (term.first + jnp.arange(N))
        distance_NRX = starts_N[:, None, None] + after_X - jnp.arange(R)[:, None]
        one_hot_NRXU = jax.nn.one_hot(bias.buckets(distance_NRX), U, dtype=jnp.float32)
        table_KGU += jnp.einsum(
            "KGNRX,NRXU->KGU", sums_KGNRX, one_hot_NRXU, precision=lax.Precision.HIGHEST
        )
    return dataclasses.replace(bias, table_KGU=table_KGU)
