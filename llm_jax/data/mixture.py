"""Several sources in one run: `data.source`, and beside it those of `data.mixture`, each with its share of rows.

    config.data.mixture = "0.25=jsonl:old/*.jsonl;0.1=tfds:state_of_the_union"

Which source a row is of, and which of its items it holds, follows from the row's number alone: after any number of
rows each source has had its share of them, less than two rows aside. A run that resumes, or runs on other
hosts, goes on as it was. Replay of old data against forgetting is such a mixture (Robins 1995; Ibrahim et al. 2024).
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.data import batch as batch_lib
from llm_jax.data.objectives import draws as draws_lib
from llm_jax.data.objectives import stage as stage_lib

# Shares are counted in whole parts of this: exact, and small enough that a row's number times it is an int64.
UNIT = 1_000_000


@dataclasses.dataclass(frozen=True)
class Part:
    """A source of a mixture: its share of rows, in parts of `UNIT`, and how many items it has."""

    share: int
    num_items: int


def parse(spec: str) -> list[tuple[int, str]]:
    """Returns the share, in parts of `UNIT`, and the source of each part of a spec; raises UserError."""
    found = []
    for entry in filter(None, (part.strip() for part in spec.split(";"))):
        share, equals, source = entry.partition("=")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not (equals and source and 1 / UNIT <= value < 1):
            raise errors.UserError(
                f"config.data.mixture = {spec!r}: {entry!r} is no share and its source; write"
                " '0.25=jsonl:old/*.jsonl;0.1=tfds:NAME', shares between 0 and 1"
            )
        found.append((round(value * UNIT), source.strip()))
    if sum(share for share, _ in found) >= UNIT:
        raise errors.UserError(
            f"config.data.mixture = {spec!r}: the shares leave nothing to data.source; their sum is below 1"
        )
    return found


def sources_of(data: config_lib.DataConfig) -> list[config_lib.DataConfig]:
    """Returns the settings of data of each source of the mixture, whose training split it is."""
    return [
        dataclasses.replace(data, source=source, mixture="") for _, source in parse(data.mixture)
    ]


class Mixture(stage_lib.Stage):
    """Stages of one objective on several sources; items of the first come first, then those of the second.

    Args:
      stages: of `data.source` and then of the mixture's.
      spec: `data.mixture`.
    """

    def __init__(self, stages: Sequence[stage_lib.Stage], spec: str):
        shares = [share for share, _ in parse(spec)]
        shares.insert(0, UNIT - sum(shares))
        self._stages = tuple(stages)
        self._starts = np.cumsum([0, *(stage.num_items for stage in stages)])
        self.num_items = int(self._starts[-1])
        self.name = ", ".join(stage.name for stage in stages)
        self.parts = tuple(
            Part(share, stage.num_items) for share, stage in zip(shares, stages, strict=True)
        )
        for stage in stages:
            if not stage.num_items:
                raise errors.UserError(f"{stage.name} is too small for a single row of a mixture")

    def __call__(
        self, items: np.ndarray, rows: np.ndarray, draws: draws_lib.Draws
    ) -> batch_lib.Batch:
        whole = None
        for stage, start in zip(self._stages, self._starts, strict=False):
            is_own = (items >= start) & (items < start + stage.num_items)
            made = stage(np.where(is_own, items - start, -1), rows, draws)
            whole = made if whole is None else _chosen(is_own, made, whole)
        return whole


def _chosen(is_own_B: np.ndarray, own: batch_lib.Batch, others: batch_lib.Batch) -> batch_lib.Batch:
    """Returns the batch whose rows are `own` where it says so."""

    def choose(a, b):
        return None if a is None else np.where(is_own_B.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return batch_lib.Batch(*map(choose, own, others))
