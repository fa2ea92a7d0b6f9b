"""How the backward kernel runs: its blocks, in one run or several, and the tables of each.

Blocks shrink to what VMEM holds beside the bias; the gradient of a full array takes a run of its own.
"""

import dataclasses
import math

import jax

from llm_jax.kernels.flash_attention import backward_visits
from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import diagonals
from llm_jax.kernels.flash_attention import scores as scores_lib


@dataclasses.dataclass(frozen=True)
class Run:
    """Which gradients one run of the kernel makes.

    Attributes:
      has_dkv: of keys and values, and of a table; queries are the outer loop where it is not.
      is_of_array: of a full array alone, every block of which must be written.
    """

    has_dq: bool
    has_dkv: bool
    is_of_array: bool = False


def make_visits(
    parts: scores_lib.Parts,
    blocks: backward_visits.Blocks,
    T: int,
    S: int,
    sizes: tuple[int, int, int, int],
    q_offset: jax.Array | int,
) -> tuple[backward_visits.Visits, ...]:
    """Returns the tables of each run of the kernel.

    Args:
      parts: mask and bias; of the bias' arrays the shapes alone.
      blocks: fitted to T and S.
      sizes: query heads of a key head, widths of keys and values, bytes of an element.
    """
    parts, blocks, flat_from, runs = planned(parts, blocks, T, sizes, q_offset)
    return tuple(
        backward_visits.make_visits(
            parts.mask,
            T,
            S,
            blocks,
            q_offset,
            is_q_outer=not run.has_dkv,
            flat_from=flat_from,
            is_everywhere=run.is_of_array,
        )
        for run in runs
    )


def planned(
    parts: scores_lib.Parts,
    blocks: backward_visits.Blocks,
    T: int,
    sizes: tuple[int, int, int, int],
    q_offset: jax.Array | int,
) -> tuple[scores_lib.Parts, backward_visits.Blocks, tuple[int, int] | None, tuple[Run, ...]]:
    """Returns parts and blocks as the kernel takes them, where a tile is flat, and the runs."""
    bias, flat_from = parts.bias, diagonals.flat_from(parts.bias, blocks.open_k, blocks.open_q)
    parts, blocks = _with_bias(parts, blocks, q_offset)
    terms = parts.bias if isinstance(parts.bias, tuple) else ()
    blocks, is_at_once = _sized(blocks, T, *sizes, _bytes_taken(bias, terms, blocks))
    runs = (Run(True, True),) if is_at_once else (Run(False, True), Run(True, False))
    if isinstance(bias, biases.Full):
        runs += (Run(False, False, is_of_array=True),)
    return parts, blocks, flat_from, runs


def _fits_at_once(
    blocks: backward_visits.Blocks, T: int, group: int, C: int, Cv: int, size: int, taken: int
) -> bool:
    """Whether the queries' gradients of a group fit in VMEM beside all else that the kernel holds."""
    rows, widths = blocks.macro_q + blocks.macro_k, C + Cv
    windows, copies = 4 * size * rows * widths, size * rows * widths + 4 * blocks.macro_k * widths
    tiles = 6 * 4 * blocks.open_q * blocks.open_k
    sums = 4 * group * -(-T // blocks.macro_q) * blocks.macro_q * C
    return sums + windows + copies + tiles + taken <= blocks.vmem_bytes


def _sized(
    blocks: backward_visits.Blocks, T: int, group: int, C: int, Cv: int, size: int, taken: int
) -> tuple[backward_visits.Blocks, bool]:
    """Returns the blocks, with smaller macro blocks where VMEM asks for them, and if one run will do.

    Args:
      taken: bytes for the bias.
    """
    found = blocks
    while not _fits_at_once(found, T, group, C, Cv, size, taken):
        macros = found.macro_q // 2, found.macro_k // 2
        if macros[0] % found.open_q or macros[1] % found.open_k or min(macros) < _LEAST_MACRO:
            break
        found = dataclasses.replace(found, macro_q=macros[0], macro_k=macros[1])
    else:
        return found, True
    capped = {
        f"macro_{axis}": min(getattr(blocks, f"macro_{axis}"), _TWO_RUNS_MACRO) for axis in "qk"
    }
    return dataclasses.replace(blocks, **capped), False


# Smaller ones cost more than a second run does; in two runs nothing larger was compiled.
_LEAST_MACRO, _TWO_RUNS_MACRO = 2048, 4096


def _bytes_taken(
    bias: biases.Bias | None,
    terms: tuple[diagonals.Diagonals, ...],
    blocks: backward_visits.Blocks,
) -> int:
    """Returns the VMEM for a bias: blocks of an array, or tiles by distance and as many sums."""
    if isinstance(bias, biases.Full):
        return 2 * 4 * blocks.macro_q * blocks.macro_k
    return sum(2 * 4 * math.prod(term.tiles_shape) for term in terms)


# A full array comes in blocks of so many queries and keys at most.
_ARRAY_BLOCK = 1024


def _with_bias(
    parts: scores_lib.Parts, blocks: backward_visits.Blocks, q_offset: jax.Array | int
) -> tuple[scores_lib.Parts, backward_visits.Blocks]:
    """Returns parts with the bias as the kernel takes it, and blocks that leave room for it."""
    bias, of_open = parts.bias, (blocks.open_k, blocks.open_q)
    if bias is None:
        return parts, blocks
    if isinstance(bias, biases.Full):
        macro_k, macro_q = (
            size * max(1, min(macro, _ARRAY_BLOCK) // size)
            for macro, size in zip((blocks.macro_k, blocks.macro_q), of_open)
        )
        return parts, dataclasses.replace(blocks, macro_q=macro_q, macro_k=macro_k)
    if isinstance(bias, biases.Relative):
        of_open = (diagonals.corner(bias, *of_open),) * 2
    shapes = dict.fromkeys((of_open, (blocks.masked_k, blocks.masked_q)))
    terms = (diagonals.make(bias, parts.mask, shape, q_offset) for shape in shapes)
    return dataclasses.replace(parts, bias=tuple(terms)), blocks


def table_bytes(bias: biases.Relative, blocks: backward_visits.Blocks) -> int:
    """Returns the VMEM for the tiles of a table and the sums of its gradient, at most."""
    corner = diagonals.corner(bias, blocks.open_k, blocks.open_q)
    shapes = {(corner, corner), (blocks.masked_k, blocks.masked_q)}
    return sum(2 * 4 * diagonals.most_tiles(bias, *shape) * math.prod(shape) for shape in shapes)
