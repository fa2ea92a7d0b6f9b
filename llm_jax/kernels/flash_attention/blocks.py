"""Block sizes by device, head width and length: a table, `block_table.json`.

`python -m llm_jax.kernels.costing.tune` rewrites its rows by modelled time, and notes that time. Rows
without one are of a search by hand (causal, T 4,096, widths 64 and 128).
"""

from collections.abc import Mapping
import dataclasses
import functools
import json
import pathlib
from typing import Any

from llm_jax.kernels.flash_attention import backward_visits
from llm_jax.kernels.flash_attention import forward_visits

TABLE = pathlib.Path(__file__).with_name("block_table.json")

# What takes the sizes of another, which is most like it, until it has rows of its own.
_LIKE = {"TPU v4": "TPU v5 lite", "TPU v5": "TPU v5 lite", "TPU7x": "TPU v6 lite"}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the two kernels."""

    forward: forward_visits.Blocks = forward_visits.Blocks()
    backward: backward_visits.Blocks = backward_visits.Blocks()


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
      width, length: of the heads and sequences that the sizes were searched with.
      milliseconds: modelled, of each kernel in that search.
    """

    device_kind: str
    width: int
    length: int
    blocks: Blocks
    milliseconds: Mapping[str, float]


# Interpreted, for tests.
_CPU = Blocks(
    forward_visits.Blocks(q=256, kv=256, tile=128, chunk=128, lead=2, lag=1),
    backward_visits.Blocks(256, 256, 128, 128, 128, 128, 2, 1),
)


def make(
    forward: Mapping[str, Any] | None = None, backward: Mapping[str, Any] | None = None
) -> Blocks:
    """Returns sizes from their fields; raises ValueError where they do not divide each other."""
    return Blocks(
        forward_visits.Blocks(**(forward or {})), backward_visits.Blocks(**(backward or {}))
    )


@functools.cache
def rows(path: pathlib.Path = TABLE) -> tuple[Row, ...]:
    """Returns the table."""
    return tuple(
        Row(**{**fields, "blocks": make(**fields["blocks"])})
        for fields in json.loads(path.read_text())
    )


def write_row(row: Row, path: pathlib.Path = TABLE) -> None:
    """Puts a row into the table, in the place of the one for the same device, width and length."""
    table = {(one.device_kind, one.width, one.length): one for one in rows(path)}
    table[row.device_kind, row.width, row.length] = row
    lines = [json.dumps(dataclasses.asdict(table[key])) for key in sorted(table)]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    rows.cache_clear()


def is_known(device_kind: str) -> bool:
    """Returns whether there are sizes for a device."""
    return device_kind == "cpu" or bool(_rows_for(device_kind))


def _rows_for(device_kind: str) -> list[Row]:
    """Returns a device's own rows, or those of what it is like."""
    own = [row for row in rows() if row.device_kind == device_kind]
    return own or [row for row in rows() if row.device_kind == _LIKE.get(device_kind)]


def for_device(device_kind: str, width: int, length: int) -> Blocks:
    """Returns the sizes for heads of `width` in sequences of `length`.

    Those of the narrowest heads in the table that are as wide, and of the shortest sequences there
    that are as long; of the widest and longest for what is beyond them.

    Raises:
      ValueError: a device that the kernels are not made for.
    """
    if device_kind == "cpu":
        return _CPU
    own = _rows_for(device_kind)
    if not own:
        known = sorted({row.device_kind for row in rows()} | set(_LIKE) | {"cpu"})
        raise ValueError(
            f"attention 'pallas' has no block sizes for {device_kind!r}, only for"
            f" {', '.join(known)}"
        )

    def distance(row: Row) -> tuple[int, int, int, int]:
        past = [max(0, wanted - has) for wanted, has in ((width, row.width), (length, row.length))]
        return past[0], row.width, past[1], row.length

    return min(own, key=distance).blocks
