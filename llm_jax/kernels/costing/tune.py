"""Searches block sizes by modelled time: `python -m llm_jax.kernels.costing.tune --slices=v5e:1x1`.

For each chip, head width and length it starts from the sizes of the table's rows that are the fastest
there, and tries one field after the other, keeping what makes a causal bfloat16 attention faster, until a
round changes nothing. The result replaces that row of `flash_attention/block_table.json`. Some minutes a row.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

from absl import flags

from llm_jax import command
from llm_jax import errors
from llm_jax.aot import kernel_cost
from llm_jax.aot import topology
from llm_jax.kernels.costing import programs
from llm_jax.kernels.costing import shapes
from llm_jax.kernels.flash_attention import blocks as blocks_lib

_LOG = logging.getLogger(__name__)

# What is tried of each field. A combination that the sizes themselves refuse is passed over. What is timed
# is causal attention, so sizes are left out that win a few percent there and lose more elsewhere: forward
# blocks of 4,096 queries or 2,048 keys (slower for long packed documents, and long to compile)
# and open tiles of 1,024 (none lies within a window of 1,024).
_VALUES = {
    "forward": {
        "q": (1024, 2048),
        "kv": (512, 1024),
        "tile": (128, 256, 512),
        "chunk": (128, 256, 512),
        "lead": (2, 4, 6, 8, 12),
        "lag": (1, 2, 3),
        "slots": (2, 4),
    },
    "backward": {
        "open_q": (256, 512),
        "open_k": (256, 512),
        "masked_q": (128, 256, 512),
        "masked_k": (128, 256, 512),
        "open_unroll": (1, 2, 4),
        "masked_unroll": (1, 2, 4),
        "macro_q": (2048, 4096, 8192),
        "macro_k": (2048, 4096, 8192),
    },
}
# Less than this is not worth another row that differs.
_LEAST_GAIN = 0.01
# Tokens of the attention that is timed: enough for several heads of several blocks.
_TOKENS = 8192
# For one candidate: the compiler takes hours for blocks far too large.
_TIMEOUT_SECONDS = 120.0

Sizes = Mapping[str, Any]


def define_flags() -> None:
    flags.DEFINE_list("slices", "v5e:1x1,v6e:1x1", "Single chips to search for.")
    flags.DEFINE_list("widths", "64,128,256", "Head widths.")
    flags.DEFINE_list("lengths", "4096", "Queries and keys of a sequence.")
    flags.DEFINE_string("cache", None, "Folder that keeps what each program costs.")


def main() -> None:
    for slice_name in flags.FLAGS.slices:
        for width in _integers("widths"):
            for length in _integers("lengths"):
                row = search(slice_name, width, length, flags.FLAGS.cache)
                blocks_lib.write_row(row)
                print(
                    f"{slice_name}, width {width}, length {length}: {row.milliseconds}", flush=True
                )


def _integers(flag: str) -> list[int]:
    values = flags.FLAGS[flag].value
    if not all(value.isdecimal() and int(value) > 0 for value in values):
        raise errors.UserError(f"--{flag}={','.join(values)}: use positive integers")
    return [int(value) for value in values]


def search(slice_name: str, width: int, length: int, cache: str | None) -> blocks_lib.Row:
    """Returns the best sizes that the search finds for a cell of the table.

    Raises:
      errors.UserError: the sizes to start from do not compile.
    """
    found, milliseconds = {}, {}
    device_kind = topology.chip_of(slice_name).device_kind
    starts = [blocks_lib.for_device(device_kind, width, length)]
    starts += [row.blocks for row in blocks_lib.rows()]
    for kernel in ("forward", "backward"):
        time = _timer(slice_name, width, length, kernel, cache)
        known = [dataclasses.asdict(getattr(start, kernel)) for start in starts]
        distinct = [sizes for i, sizes in enumerate(known) if sizes not in known[:i]]
        found[kernel], seconds = descend(kernel, distinct, time)
        milliseconds[kernel] = round(seconds * 1e3, 4)
    blocks = blocks_lib.make(found["forward"], found["backward"])
    return blocks_lib.Row(device_kind, width, length, blocks, milliseconds)


def descend(
    kernel: str, starts: list[Sizes], time: Callable[[list[Sizes]], list[float]]
) -> tuple[dict[str, Any], float]:
    """Returns the sizes that no change of one field makes faster, and their time.

    Args:
      kernel: forward or backward.
      starts: sizes to begin with, of which the fastest are taken.
      time: from several sizes to their seconds; infinite where one does not compile.
    """
    seconds_of = time(starts)
    least = min(seconds_of)
    best = dict(starts[seconds_of.index(least)])
    if least == float("inf"):
        raise errors.UserError(f"no {kernel} sizes to start from compile: {starts}")
    has_improved = True
    while has_improved:
        has_improved = False
        for field in _VALUES[kernel]:
            others = list(_changes(kernel, best, field))
            seconds = dict(enumerate(time(others)))
            place = min(seconds, key=seconds.get, default=None)
            if place is not None and seconds[place] < least * (1 - _LEAST_GAIN):
                best, least, has_improved = others[place], seconds[place], True
                _LOG.info("%s %s = %s: %.4f ms", kernel, field, best[field], least * 1e3)
    return best, least


def _changes(kernel: str, sizes: Sizes, field: str) -> Iterator[dict[str, Any]]:
    """Yields the sizes with another value of one field, where they are valid."""
    for value in _VALUES[kernel][field]:
        changed = {**sizes, field: value}
        if value == sizes[field]:
            continue
        try:
            blocks_lib.make(**{kernel: changed})
        except ValueError:  # sizes that do not divide each other
            continue
        yield changed


def _timer(
    slice_name: str, width: int, length: int, kernel: str, cache: str | None
) -> Callable[[list[Sizes]], list[float]]:
    """Returns what `descend` times a kernel by."""
    shape = shapes.Attention(
        batch=max(1, _TOKENS // length),
        length=length,
        heads=4,
        width=width,
        has_gradient=kernel == "backward",
    )

    def time(candidates: list[Sizes]) -> list[float]:
        cases = [
            kernel_cost.Case(
                programs.target("attention"),
                slice_name,
                {"shape": dataclasses.asdict(shape), "blocks": {kernel: dict(sizes)}},
            )
            for sizes in candidates
        ]
        if not cases:
            return []
        results = kernel_cost.costs(cases, cache_directory=cache, timeout_seconds=_TIMEOUT_SECONDS)
        return [_seconds(result, f"flash_attention_{kernel}") for result in results]

    return time


def _seconds(result: kernel_cost.ProgramCost | kernel_cost.Refusal, kernel: str) -> float:
    if isinstance(result, kernel_cost.Refusal) or not result.is_exact:
        return float("inf")
    return sum(one.seconds for one in result.kernels if kernel in one.name)


if __name__ == "__main__":
    command.run(main, define_flags)
