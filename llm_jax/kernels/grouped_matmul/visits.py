"""Which rows meet which group, one stretch after the other: tables of integers for the kernels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """Stretches of rows in order, each of one group and within one lap of so many rows.

    Attributes:
      lap, group: int32 [visits], of each visit; those that do not happen come after the others.
      start, stop: int32 [visits], the group's rows in the lap, counted from the lap's first.
      after: int32 [visits], the first visit of the next group.
      counts: int32 [2], how many visits happen, and how many rows groups have.
      rows: of a lap.
    """

    lap: Any
    group: Any
    start: Any
    stop: Any
    after: Any
    counts: Any
    rows: int = dataclasses.field(metadata={"static": True})

    @property
    def tables(self) -> tuple[Any, ...]:
        """In the order in which the kernels take them."""
        return self.lap, self.group, self.start, self.stop, self.after, self.counts


def make(sizes_E: jax.Array, num_rows: int, rows: int, *, of_all_groups: bool) -> Visits:
    """Returns the visits of rows in groups.

    Args:
      sizes_E: int32, rows of each group. Those of numpy give tables that are constants of the program.
      num_rows: R.
      rows: of a lap.
      of_all_groups: a group without rows has a visit too, of none.
    """
    if isinstance(sizes_E, np.ndarray):
        with jax.ensure_compile_time_eval():
            visits = _make(jnp.asarray(sizes_E), num_rows, rows, of_all_groups)
            return jax.tree.map(np.asarray, visits)
    return _make(sizes_E, num_rows, rows, of_all_groups)


def _make(sizes_E: jax.Array, num_rows: int, rows: int, of_all_groups: bool) -> Visits:
    E, num_laps = sizes_E.shape[0], -(-num_rows // rows)
    # Sums over pairs of groups, and below over visits and groups: one fused operation each, where
    # cumulative sums and gathers are several, slower than these are long.
    is_before_EE = jnp.arange(E)[:, None] <= jnp.arange(E)[None, :]

    def summed(counts_E):
        return jnp.sum(jnp.where(is_before_EE, counts_E[:, None], 0), axis=0)

    # More rows than there are would be read from memory that is not the array's.
    ends_E = jnp.minimum(summed(sizes_E), num_rows)
    starts_E = jnp.minimum(ends_E, summed(sizes_E) - sizes_E)
    sizes_E = ends_E - starts_E
    laps_E = jnp.minimum(starts_E // rows, num_laps - 1)
    visits_E = (ends_E - 1) // rows - laps_E + 1
    visits_E = jnp.where(sizes_E > 0, visits_E, int(of_all_groups))
    last_E = summed(visits_E)
    # Every group but the first may begin within a lap.
    visit = jnp.arange(num_laps + E - 1)
    group = jnp.minimum(jnp.sum((last_E <= visit[:, None]).astype(jnp.int32), axis=1), E - 1)
    is_own = group[:, None] == jnp.arange(E)

    def own(of_E):
        return jnp.sum(jnp.where(is_own, of_E, 0), axis=1)

    lap = jnp.clip(visit + own(laps_E - last_E + visits_E), 0, num_laps - 1)
    return Visits(
        lap=lap,
        group=group,
        start=jnp.clip(own(starts_E) - lap * rows, 0, rows),
        stop=jnp.clip(own(ends_E) - lap * rows, 0, rows),
        after=own(last_E),
        counts=jnp.stack([last_E[-1], ends_E[-1]]),
        rows=rows,
    )
