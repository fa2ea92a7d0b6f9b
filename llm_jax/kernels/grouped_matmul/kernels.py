"""The kernels of the grouped matrix product, for the rows and matrices of one device.

Rows come in chunks, in order, into a ring in VMEM, and matrices group by group into slots beside it,
fetched while what came before them is multiplied. Neither waits for a step of a grid: where groups are
short and long by turns, a pipeline of steps would have nothing fetched for the long ones, and wait.
A group is multiplied in pieces of rows wherever it begins, so that one that begins or ends within a
chunk costs no more than its rows, rounded up to the smallest piece.
"""

import dataclasses
import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from llm_jax.kernels.grouped_matmul import blocks as blocks_lib
from llm_jax.kernels.grouped_matmul import visits as visits_lib

_NUM_TABLES = 6


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


def _sublanes(dtype) -> int:
    """Returns how many rows share a register: pieces begin at multiples."""
    return 32 // jnp.dtype(dtype).itemsize


def _select(x, other, start, stop):
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


def _for_pieces(start, stop, end, blocks: blocks_lib.Blocks, dtype, whole, rest) -> None:
    """Calls `whole(first, begin)` and `rest(first, begin)` for pieces that cover [start, stop).

    A piece begins at `first` and is to change no row before `begin`. Those of `blocks.piece` rows come
    first, then those of `blocks.rest`; none goes past `end`.
    """
    align = _sublanes(dtype)
    base = jax.lax.div(start, align) * align
    num_pieces = jax.lax.div(stop - base, blocks.piece)

    def run_whole(index, _):
        first = pl.multiple_of(base + index * blocks.piece, align)
        whole(first, jnp.maximum(first, start))
        return _

    jax.lax.fori_loop(0, num_pieces, run_whole, 0)
    left = base + num_pieces * blocks.piece

    def run_rest(index, _):
        begin = left + index * blocks.rest
        first = pl.multiple_of(jnp.minimum(begin, end - blocks.rest), align)
        rest(first, jnp.maximum(begin, start))
        return _

    jax.lax.fori_loop(0, _ceil(stop - left, blocks.rest), run_rest, 0)


def _part(index, size: int, whole: int):
    """Returns the slice that a pass takes of a dimension; the last one overlaps with that before it."""
    start = jnp.minimum(index * size, whole - size)
    return pl.ds(pl.multiple_of(start, math.gcd(size, whole)), size)


def _chunk(index, size: int):
    return pl.ds(pl.multiple_of(index * size, size), size)


def _ceil(number, size: int):
    return jax.lax.div(number + size - 1, size)


def _for(start, stop, run) -> None:
    def step(index, _):
        run(index)
        return _

    jax.lax.fori_loop(start, stop, step, 0)


def _for_visits(tables, static: Static, *, load, wait, begin, compute, end, finish):
    """Goes over the rows once for each pass, with chunks of them loaded ahead.

    Args:
      load: starts the copy of a chunk in a pass; called with the chunk and the pass.
      wait: for a chunk, to be read and its place in the ring's results to be free.
      begin, compute, end: at the first visit of a group, at each, at the last; called with the pass, the
        visit and how many groups began before, `compute` with the end of the last chunk there is, too.
      finish: with a chunk when all of its rows were computed.
    """
    laps, groups, starts, stops, afters, counts = tables
    blocks = static.blocks
    num_visits, num_chunks = counts[0], _ceil(counts[1], blocks.chunk)
    first_pass = pl.program_id(0) * static.passes
    _for(0, jnp.minimum(num_chunks, blocks.chunks), lambda chunk: load(chunk, first_pass))

    def run_visit(p, visit, state):
        num_groups, arrived, done = state
        lap, group, stop = laps[visit], groups[visit], stops[visit]
        is_first = (visit == 0) | (groups[jnp.maximum(visit - 1, 0)] != group)
        is_last = visit + 1 == afters[visit]
        pl.when(is_first)(lambda: begin(p, visit, num_groups))
        needed = jnp.maximum(arrived, _ceil(lap * blocks.ring + stop, blocks.chunk))
        _for(arrived, needed, lambda chunk: wait(chunk, p))
        reached = needed * blocks.chunk - lap * blocks.ring
        pl.when(stop > starts[visit])(lambda: compute(p, visit, num_groups, reached))
        pl.when(is_last)(lambda: end(p, visit, num_groups))
        complete = jax.lax.div(lap * blocks.ring + stop, blocks.chunk)
        complete = jnp.where(visit + 1 == num_visits, num_chunks, complete)

        def complete_chunk(chunk):
            finish(chunk, p)
            following = chunk + blocks.chunks
            is_of_pass = following < num_chunks

            @pl.when(is_of_pass | (p + 1 < first_pass + static.passes))
            def _():
                load(
                    jnp.where(is_of_pass, following, jax.lax.rem(chunk, blocks.chunks)),
                    jnp.where(is_of_pass, p, p + 1),
                )

        _for(done, complete, complete_chunk)
        return num_groups + is_last.astype(jnp.int32), needed, jnp.maximum(done, complete)

    def run_pass(index, num_groups):
        state = num_groups, jnp.int32(0), jnp.int32(0)
        run = functools.partial(run_visit, first_pass + index)
        return jax.lax.fori_loop(0, num_visits, run, state)[0]

    jax.lax.fori_loop(0, static.passes, run_pass, jnp.int32(0))


def _product_kernel(*refs, static: Static):
    """Results gather in a ring of their own, beside the rows; from there chunks are copied out."""
    tables, (x_hbm, w_hbm, y_hbm, x_ring, y_ring, w_slots, x_flags, y_flags, w_flags) = (
        refs[:_NUM_TABLES],
        refs[_NUM_TABLES:],
    )
    _, groups, starts, stops, afters, counts = tables
    blocks, dtype = static.blocks, x_ring.dtype
    num_visits, num_rows = counts[0], counts[1]
    num_chunks = _ceil(num_rows, blocks.chunk)
    first_pass = pl.program_id(0) * static.passes
    align = _sublanes(dtype)

    def rows_of(chunk):
        return _chunk(chunk, blocks.chunk)

    def columns_of(p):
        return _part(p, blocks.columns, y_hbm.shape[1])

    def copy_x(chunk):
        place = jax.lax.rem(chunk, blocks.chunks)
        source, target = x_hbm.at[rows_of(chunk)], x_ring.at[rows_of(place)]
        return pltpu.make_async_copy(source, target, x_flags.at[place])

    def copy_y(chunk, p):
        place = jax.lax.rem(chunk, blocks.chunks)
        target = y_hbm.at[rows_of(chunk), columns_of(p)]
        return pltpu.make_async_copy(y_ring.at[rows_of(place)], target, y_flags.at[place])

    def copy_w(visit, p, number):
        slot = jax.lax.rem(number, blocks.slots)
        columns = columns_of(p)
        place = (columns, slice(None)) if static.is_transposed else (slice(None), columns)
        source = w_hbm.at[(groups[visit], *place)]
        return pltpu.make_async_copy(source, w_slots.at[slot], w_flags.at[slot])

    def following(visit, p):
        """Returns the next group's first visit, perhaps in the next pass."""
        is_of_pass = afters[visit] < num_visits
        return jnp.where(is_of_pass, afters[visit], 0), jnp.where(is_of_pass, p, p + 1)

    def load_w(visit, p, number):
        pl.when(p < first_pass + static.passes)(lambda: copy_w(visit, p, number).start())

    @pl.when(num_visits > 0)
    def _():
        visit, p = jnp.int32(0), first_pass
        for number in range(blocks.slots - 1):
            load_w(visit, p, number)
            visit, p = following(visit, p)

    def begin(p, visit, number):
        copy_w(visit, p, number).wait()
        ahead = visit, p
        for _ in range(blocks.slots - 1):
            ahead = following(*ahead)
        load_w(*ahead, number + blocks.slots - 1)

    def wait(chunk, p):
        copy_x(chunk).wait()
        is_reused = (p > first_pass) | (chunk >= blocks.chunks)
        pl.when(is_reused)(lambda: copy_y(chunk, p).wait())

    def compute(p, visit, number, reached):
        del p
        start, stop = starts[visit], stops[visit]
        slot = jax.lax.rem(number, blocks.slots)

        def dot(rows, columns):
            w = w_slots[slot, columns, :] if static.is_transposed else w_slots[slot, :, columns]
            dims = (((1,), (1 if static.is_transposed else 0,)), ((), ()))
            y = jax.lax.dot_general(x_ring[rows, :], w, dims, preferred_element_type=jnp.float32)
            return y.astype(dtype)

        def for_tiles(run):
            _for(0, blocks.columns // blocks.tile, lambda tile: run(_chunk(tile, blocks.tile)))

        def whole(first, begin):
            rows, strip = pl.ds(first, blocks.piece), pl.ds(first, align)

            def run(columns):
                # Only what shares registers with rows before the group has to be kept.
                before = y_ring[strip, columns]
                y_ring[rows, columns] = dot(rows, columns)
                y_ring[strip, columns] = _select(
                    y_ring[strip, columns], before, begin - first, align
                )

            for_tiles(run)

        def rest(first, begin):
            rows = pl.ds(first, blocks.rest)

            def run(columns):
                y_ring[rows, columns] = _select(
                    dot(rows, columns), y_ring[rows, columns], begin - first, blocks.rest
                )

            for_tiles(run)

        _for_pieces(start, stop, reached, blocks, dtype, whole, rest)

    def finish(chunk, p):
        @pl.when((chunk + 1) * blocks.chunk > num_rows)
        def _():
            rows = rows_of(jax.lax.rem(chunk, blocks.chunks))
            y_ring[rows, :] = _select(y_ring[rows, :], None, 0, num_rows - chunk * blocks.chunk)

        copy_y(chunk, p).start()

    _for_visits(
        tables,
        static,
        load=lambda chunk, p: copy_x(chunk).start(),
        wait=wait,
        begin=begin,
        compute=compute,
        end=lambda *_: None,
        finish=finish,
    )
    _for(0, jnp.minimum(num_chunks, blocks.chunks), lambda place: copy_y(place, 0).wait())

    # What no group has.
    rest = y_hbm.shape[0] // blocks.chunk - num_chunks

    @pl.when(rest > 0)
    def _():
        y_ring[: blocks.chunk] = jnp.zeros((blocks.chunk, blocks.columns), dtype)

        def copy(index):
            chunk = num_chunks + jax.lax.rem(index, rest)
            target = y_hbm.at[rows_of(chunk), columns_of(first_pass + jax.lax.div(index, rest))]
            return pltpu.make_async_copy(y_ring.at[: blocks.chunk], target, y_flags.at[0])

        _for(0, rest * static.passes, lambda index: copy(index).start())
        _for(0, rest * static.passes, lambda index: copy(index).wait())


def product(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    visits: visits_lib.Visits,
    *,
    static: Static,
    vmem_limit: int,
    interpret: bool,
) -> jax.Array:
    """Returns rows times their group's matrix, or its transpose.

    Chunks must divide R, and the width of the result must hold `static`'s columns.
    """
    (R, D), E, blocks = x_RD.shape, w_EDF.shape[0], static.blocks
    width = w_EDF.shape[1 if static.is_transposed else 2]
    steps = static.passes * static.cores
    matrix = (blocks.columns, D) if static.is_transposed else (D, blocks.columns)
    return _call(
        functools.partial(_product_kernel, static=static),
        (*visits.tables, x_RD, w_EDF),
        (R, width),
        "grouped_matmul_product",
        static,
        [
            pltpu.VMEM((blocks.ring, D), x_RD.dtype),
            pltpu.VMEM((blocks.ring, blocks.columns), x_RD.dtype),
            pltpu.VMEM((blocks.slots, *matrix), x_RD.dtype),
            pltpu.SemaphoreType.DMA((blocks.chunks,)),
            pltpu.SemaphoreType.DMA((blocks.chunks,)),
            pltpu.SemaphoreType.DMA((blocks.slots,)),
        ],
        num_flops=2 * R * D * width,
        num_elements=steps * R * D + E * D * width + R * width,
        vmem_limit=vmem_limit,
        interpret=interpret,
    )


def _gradient_kernel(*refs, static: Static, num_columns: int):
    """The sum over a group's rows stays in VMEM until its last visit, then it is copied out."""
    tables, refs = refs[:_NUM_TABLES], refs[_NUM_TABLES:]
    x_hbm, dy_hbm, dw_hbm, x_ring, dy_ring, sum_ref, dw_slots, flags, dw_flags = refs
    _, groups, starts, stops, _, counts = tables
    blocks, dtype = static.blocks, x_ring.dtype

    def block_of(p):
        """Returns the part of matrices that a pass makes."""
        return (
            _part(jax.lax.div(p, num_columns), blocks.depth, dw_hbm.shape[1]),
            _part(jax.lax.rem(p, num_columns), blocks.columns, dw_hbm.shape[2]),
        )

    def copies(chunk, p):
        place, widths = jax.lax.rem(chunk, blocks.chunks), block_of(p)
        arrays = (x_hbm, x_ring), (dy_hbm, dy_ring)
        return [
            pltpu.make_async_copy(
                hbm.at[_chunk(chunk, blocks.chunk), width],
                ring.at[_chunk(place, blocks.chunk)],
                flags.at[place],
            )
            for (hbm, ring), width in zip(arrays, widths)
        ]

    def load(chunk, p):
        for copy in copies(chunk, p):
            copy.start()

    def wait(chunk, p):
        for copy in copies(chunk, p):
            copy.wait()

    def copy_dw(p, visit, slot):
        target = dw_hbm.at[(groups[visit], *block_of(p))]
        return pltpu.make_async_copy(dw_slots.at[slot], target, dw_flags.at[slot])

    def begin(p, visit, number):
        slot = jax.lax.rem(number, blocks.slots)
        pl.when(number >= blocks.slots)(lambda: copy_dw(p, visit, slot).wait())

        @pl.when(starts[visit] == stops[visit])
        def _():
            dw_slots[slot] = jnp.zeros_like(dw_slots[slot])

    def compute(p, visit, number, reached):
        del p
        start, stop = starts[visit], stops[visit]
        slot = jax.lax.rem(number, blocks.slots)
        is_new = (visit == 0) | (groups[jnp.maximum(visit - 1, 0)] != groups[visit])

        def add(size, first, begin):
            rows = pl.ds(first, size)

            def own(ring, columns):
                return _select(ring[rows, columns], None, begin - first, stop - first)

            def run(tile):
                columns = _chunk(tile, blocks.tile)
                product = jax.lax.dot_general(
                    own(x_ring, slice(None)),
                    own(dy_ring, columns),
                    (((0,), (0,)), ((), ())),
                    preferred_element_type=jnp.float32,
                )
                # Neither is set to 0 before, nor rounded in the end: both would hold up products.
                total = product + jnp.where(is_new & (begin == start), 0.0, sum_ref[:, columns])
                sum_ref[:, columns] = total
                dw_slots[slot, :, columns] = total.astype(dtype)

            _for(0, blocks.columns // blocks.tile, run)

        whole, rest = (functools.partial(add, size) for size in (blocks.piece, blocks.rest))
        _for_pieces(start, stop, reached, blocks, dtype, whole, rest)

    def end(p, visit, number):
        copy_dw(p, visit, jax.lax.rem(number, blocks.slots)).start()

    _for_visits(
        tables,
        static,
        load=load,
        wait=wait,
        begin=begin,
        compute=compute,
        end=end,
        finish=lambda *_: None,
    )
    for slot in range(min(blocks.slots, dw_hbm.shape[0] * static.passes)):
        copy_dw(0, 0, slot).wait()


def weight_gradient(
    x_RD: jax.Array,
    dy_RF: jax.Array,
    visits: visits_lib.Visits,
    num_groups: int,
    *,
    static: Static,
    vmem_limit: int,
    interpret: bool,
) -> jax.Array:
    """Returns the sums of outer products over each group's rows.

    Chunks must divide R, D and F hold `static`'s depth and columns.
    """
    (R, D), F, blocks = x_RD.shape, dy_RF.shape[1], static.blocks
    num_columns, E, dtype = pl.cdiv(F, blocks.columns), num_groups, x_RD.dtype
    return _call(
        functools.partial(_gradient_kernel, static=static, num_columns=num_columns),
        (*visits.tables, x_RD, dy_RF),
        (E, D, F),
        "grouped_matmul_gradient",
        static,
        [
            pltpu.VMEM((blocks.ring, blocks.depth), dtype),
            pltpu.VMEM((blocks.ring, blocks.columns), dtype),
            pltpu.VMEM((blocks.depth, blocks.columns), jnp.float32),
            pltpu.VMEM((blocks.slots, blocks.depth, blocks.columns), dtype),
            pltpu.SemaphoreType.DMA((blocks.chunks,)),
            pltpu.SemaphoreType.DMA((blocks.slots,)),
        ],
        num_flops=2 * R * D * F,
        num_elements=num_columns * R * D + pl.cdiv(D, blocks.depth) * R * F + E * D * F,
        vmem_limit=vmem_limit,
        interpret=interpret,
    )


def _call(
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
            num_scalar_prefetch=_NUM_TABLES,
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
