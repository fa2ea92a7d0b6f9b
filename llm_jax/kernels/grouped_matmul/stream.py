"""Rows and groups as they come by in a kernel: what products and gradients have in common.

Rows come in chunks, in order, into a ring in VMEM, and what belongs to groups into slots beside it,
fetched while what came before is computed. Neither waits for a step of a grid: where groups are short
and long by turns, a pipeline of steps would have nothing fetched for the long ones, and wait. A group is
computed in pieces of rows wherever it begins, so that one that begins or ends within a chunk costs no
more than its rows, rounded up to the smallest piece.
"""

import dataclasses
import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from llm_jax.kernels.grouped_matmul import blocks as blocks_lib

NUM_TABLES = 6  # of `visits.Visits`


@dataclasses.dataclass(frozen=True)
class Static:
    """What a kernel knows beside its arrays.

    Attributes:
      passes: over the rows, of one core; each makes some columns of the result.
      cores: that have passes of their own.
      is_transposed: whether rows are multiplied by the matrices' transposes.
    """

    blocks: blocks_lib.Blocks
    passes: int
    cores: int = 1
    is_transposed: bool = False


def sublanes(dtype) -> int:
    """Returns how many rows share a register: pieces begin at multiples."""
    return 32 // jnp.dtype(dtype).itemsize


def select(x, other, start, stop):
    """Returns the rows from `start` to `stop` of `x`, and of `other` (0 if None) the rest."""
    if x.dtype == jnp.bfloat16:
        # Two rows share a word: masks of bits are one operation, where a selection would unpack.
        words = pltpu.bitcast(x, jnp.int32)
        first = 2 * jax.lax.broadcasted_iota(jnp.int32, words.shape, 0)
        low = jnp.where((first >= start) & (first < stop), 0xFFFF, 0)
        high = jnp.where((first + 1 >= start) & (first + 1 < stop), -0x10000, 0)
        mask = low | high
        words &= mask
        if other is not None:
            words |= pltpu.bitcast(other, jnp.int32) & ~mask
        return pltpu.bitcast(words, jnp.bfloat16)
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    is_in = (place >= start) & (place < stop)
    return jnp.where(is_in, x, jnp.zeros((), x.dtype) if other is None else other)


def part(index, size: int, whole: int):
    """Returns the slice that a pass takes of a dimension; the last one overlaps with that before it."""
    start = jnp.minimum(index * size, whole - size)
    return pl.ds(pl.multiple_of(start, math.gcd(size, whole)), size)


def chunk_of(index, size: int):
    return pl.ds(pl.multiple_of(index * size, size), size)


def ceil(number, size: int):
    return jax.lax.div(number + size - 1, size)


def for_each(start, stop, run) -> None:
    def step(index, _):
        run(index)
        return _

    jax.lax.fori_loop(start, stop, step, 0)


class Rows:
    """The rows of a pass as they come and go: a chunk is waited for before it is computed with, and when
    all of it was, it is finished, and another one is loaded into its place.

    What came and what is done are two numbers of chunks, handed from call to call.
    """

    def __init__(self, blocks: blocks_lib.Blocks, num_rows, p, is_last_pass, load, wait, finish):
        self._blocks = blocks
        self._num_chunks = ceil(num_rows, blocks.chunk)
        self._pass, self._is_last_pass = p, is_last_pass
        self._load, self._wait, self._finish = load, wait, finish

    def arrive(self, row, arrived):
        """Waits for all rows before `row`."""
        needed = jnp.maximum(arrived, ceil(row, self._blocks.chunk))
        for_each(arrived, needed, lambda chunk: self._wait(chunk, self._pass))
        return needed

    def complete(self, row, done):
        """Finishes the chunks before `row`."""
        return self._complete(jax.lax.div(row, self._blocks.chunk), done)

    def complete_all(self, done):
        return self._complete(self._num_chunks, done)

    def _complete(self, count, done):
        def run(chunk):
            self._finish(chunk, self._pass)
            following = chunk + self._blocks.chunks
            is_of_pass = following < self._num_chunks

            @pl.when(is_of_pass | ~self._is_last_pass)
            def _():
                first = jax.lax.rem(chunk, self._blocks.chunks)
                self._load(
                    jnp.where(is_of_pass, following, first),
                    jnp.where(is_of_pass, self._pass, self._pass + 1),
                )

        count = jnp.maximum(count, done)
        for_each(done, count, run)
        return count


def for_pieces(start, stop, lap, blocks: blocks_lib.Blocks, align: int, rows: Rows, state, run):
    """Runs pieces that cover the rows [start, stop) of a lap: `run(size, first, begin)`.

    A piece has `size` rows from `first` on, and is to change none before `begin`. Those of `blocks.piece`
    rows come first, then those of `blocks.rest`. None reaches into a chunk without rows of [start, stop).

    Args:
      align: of `first`.
      state: what of `rows` arrived and is done.

    Returns:
      What is then.
    """
    before = lap * blocks.ring
    base = jax.lax.div(start, align) * align
    num_pieces = jax.lax.div(stop - base, blocks.piece)
    left = base + num_pieces * blocks.piece

    def run_whole(index, state):
        arrived, done = state
        first = pl.multiple_of(base + index * blocks.piece, align)
        end = before + first + blocks.piece
        arrived = rows.arrive(end, arrived)
        run(blocks.piece, first, jnp.maximum(first, start))
        return arrived, rows.complete(end, done)

    def run_rest(index, state):
        arrived, done = state
        begin = left + index * blocks.rest
        end = before + jnp.minimum(begin + blocks.rest, stop)
        arrived = rows.arrive(end, arrived)
        end_of_chunk = ceil(end, blocks.chunk) * blocks.chunk - before
        first = pl.multiple_of(jnp.minimum(begin, end_of_chunk - blocks.rest), align)
        run(blocks.rest, first, jnp.maximum(begin, start))
        return arrived, rows.complete(end, done)

    state = jax.lax.fori_loop(0, num_pieces, run_whole, state)
    num_rests = jnp.where(stop > start, ceil(stop - left, blocks.rest), 0)
    return jax.lax.fori_loop(0, num_rests, run_rest, state)


def for_visits(tables, static: Static, align: int, *, load, wait, begin, compute, end, finish):
    """Goes over the rows once for each pass, with chunks of them loaded ahead.

    Args:
      align: of rows that pieces begin with.
      load: starts the copy of a chunk in a pass; called with the chunk and the pass.
      wait: for a chunk, to be read and its place in the ring's results to be free.
      begin, end: at the first visit of a group, and at the last; called with the pass, the visit and how
        many groups began before.
      compute: with a visit, how many groups began before, and a piece's size, first row and the first
        that it may change.
      finish: with a chunk when all of its rows were computed, and the pass.
    """
    laps, groups, starts, stops, afters, counts = tables
    blocks, (num_visits, num_rows) = static.blocks, (counts[0], counts[1])
    first_pass = pl.program_id(0) * static.passes
    num_chunks = jnp.minimum(ceil(num_rows, blocks.chunk), blocks.chunks)
    for_each(0, num_chunks, lambda chunk: load(chunk, first_pass))

    def run_visit(p, rows, visit, state):
        num_groups, *state = state
        group = groups[visit]
        is_first = (visit == 0) | (groups[jnp.maximum(visit - 1, 0)] != group)
        is_last = visit + 1 == afters[visit]
        pl.when(is_first)(lambda: begin(p, visit, num_groups))
        run = functools.partial(compute, visit, num_groups)
        arrived, done = for_pieces(
            starts[visit], stops[visit], laps[visit], blocks, align, rows, tuple(state), run
        )
        pl.when(is_last)(lambda: end(p, visit, num_groups))
        return num_groups + is_last.astype(jnp.int32), arrived, done

    def run_pass(index, num_groups):
        p = first_pass + index
        rows = Rows(blocks, num_rows, p, index + 1 == static.passes, load, wait, finish)
        state = num_groups, jnp.int32(0), jnp.int32(0)
        run = functools.partial(run_visit, p, rows)
        num_groups, _, done = jax.lax.fori_loop(0, num_visits, run, state)
        rows.complete_all(done)
        return num_groups

    jax.lax.fori_loop(0, static.passes, run_pass, jnp.int32(0))


def call(
    kernel,
    arguments,
    shape,
    name,
    static,
    scratch,
    *,
    num_flops,
    num_elements,
    vmem_limit,
    interpret,
):
    """Runs a kernel of two arrays behind tables; all of them stay where they are."""
    kind = jax.typeof(arguments[-1])
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=NUM_TABLES,
            grid=(static.cores,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=scratch,
        ),
        # It varies over the axes of the mesh that the arguments do.
        out_shape=jax.ShapeDtypeStruct(shape, kind.dtype, manual_axis_type=kind.manual_axis_type),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=num_flops, transcendentals=0, bytes_accessed=num_elements * kind.dtype.itemsize
        ),
        interpret=interpret,
        name=name,
    )(*arguments)
