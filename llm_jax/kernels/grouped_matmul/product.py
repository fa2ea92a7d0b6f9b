"""The kernel of rows times their group's matrix, or its transpose, on one device."""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from llm_jax.kernels.grouped_matmul import stream
from llm_jax.kernels.grouped_matmul import visits as visits_lib


def _product_kernel(*refs, static: stream.Static):
    """Results gather in a ring of their own, beside the rows; from there chunks are copied out."""
    tables, (x_hbm, w_hbm, y_hbm, x_ring, y_ring, w_slots, x_flags, y_flags, w_flags) = (
        refs[: stream.NUM_TABLES],
        refs[stream.NUM_TABLES :],
    )
    _, groups, _, _, afters, counts = tables
    blocks, dtype = static.blocks, x_ring.dtype
    num_visits, num_rows = counts[0], counts[1]
    num_chunks = stream.ceil(num_rows, blocks.chunk)
    first_pass = pl.program_id(0) * static.passes
    align = stream.sublanes(dtype)

    def rows_of(chunk):
        return stream.chunk_of(chunk, blocks.chunk)

    def columns_of(p):
        return stream.part(p, blocks.columns, y_hbm.shape[1])

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

    def compute(visit, number, size, first, begin):
        slot, rows = jax.lax.rem(number, blocks.slots), pl.ds(first, size)

        def dot(columns):
            w = w_slots[slot, columns, :] if static.is_transposed else w_slots[slot, :, columns]
            dims = (((1,), (1 if static.is_transposed else 0,)), ((), ()))
            y = jax.lax.dot_general(x_ring[rows, :], w, dims, preferred_element_type=jnp.float32)
            return y.astype(dtype)

        def run(tile):
            columns = stream.chunk_of(tile, blocks.tile)
            if size == blocks.rest:
                before = y_ring[rows, columns]
                y_ring[rows, columns] = stream.select(dot(columns), before, begin - first, size)
            else:
                # A whole piece has no more rows of others than share registers with the group's first.
                strip = pl.ds(first, align)
                before = y_ring[strip, columns]
                y_ring[rows, columns] = dot(columns)
                after = y_ring[strip, columns]
                y_ring[strip, columns] = stream.select(after, before, begin - first, align)

        stream.for_each(0, blocks.columns // blocks.tile, run)

    def finish(chunk, p):
        @pl.when((chunk + 1) * blocks.chunk > num_rows)
        def _():
            rows = rows_of(jax.lax.rem(chunk, blocks.chunks))
            y_ring[rows, :] = stream.select(
                y_ring[rows, :], None, 0, num_rows - chunk * blocks.chunk
            )

        copy_y(chunk, p).start()

    stream.for_visits(
        tables,
        static,
        align,
        load=lambda chunk, p: copy_x(chunk).start(),
        wait=wait,
        begin=begin,
        compute=compute,
        end=lambda *_: None,
        finish=finish,
    )
    stream.for_each(
        0, jnp.minimum(num_chunks, blocks.chunks), lambda place: copy_y(place, 0).wait()
    )

    # What no group has.
    rest = y_hbm.shape[0] // blocks.chunk - num_chunks

    @pl.when(rest > 0)
    def _():
        y_ring[: blocks.chunk] = jnp.zeros((blocks.chunk, blocks.columns), dtype)

        def copy(index):
            chunk = num_chunks + jax.lax.rem(index, rest)
            target = y_hbm.at[rows_of(chunk), columns_of(first_pass + jax.lax.div(index, rest))]
            return pltpu.make_async_copy(y_ring.at[: blocks.chunk], target, y_flags.at[0])

        stream.for_each(0, rest * static.passes, lambda index: copy(index).start())
        stream.for_each(0, rest * static.passes, lambda index: copy(index).wait())


def product(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    visits: visits_lib.Visits,
    *,
    static: stream.Static,
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
    return stream.call(
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
