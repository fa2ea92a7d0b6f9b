"""The kernel of the gradient of each group's matrix, on one device."""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from llm_jax.kernels.grouped_matmul import stream
from llm_jax.kernels.grouped_matmul import visits as visits_lib


def _gradient_kernel(*refs, static: stream.Static, num_columns: int):
    """The sum over a group's rows stays in VMEM until its last visit, then it is copied out."""
    tables, refs = refs[: stream.NUM_TABLES], refs[stream.NUM_TABLES :]
    x_hbm, dy_hbm, dw_hbm, x_ring, dy_ring, sum_ref, dw_slots, flags, dw_flags = refs
    _, groups, starts, stops, _, counts = tables
    blocks, dtype = static.blocks, x_ring.dtype

    def block_of(p):
        """Returns the part of matrices that a pass makes."""
        return (
            stream.part(jax.lax.div(p, num_columns), blocks.depth, dw_hbm.shape[1]),
            stream.part(jax.lax.rem(p, num_columns), blocks.columns, dw_hbm.shape[2]),
        )

    def copies(chunk, p):
        place, widths = jax.lax.rem(chunk, blocks.chunks), block_of(p)
        arrays = (x_hbm, x_ring), (dy_hbm, dy_ring)
        return [
            pltpu.make_async_copy(
                hbm.at[stream.chunk_of(chunk, blocks.chunk), width],
                ring.at[stream.chunk_of(place, blocks.chunk)],
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

    def compute(visit, number, size, first, begin):
        slot, rows = jax.lax.rem(number, blocks.slots), pl.ds(first, size)
        start, stop = starts[visit], stops[visit]
        is_first = (visit == 0) | (groups[jnp.maximum(visit - 1, 0)] != groups[visit])
        is_new = is_first & (begin == start)

        def own(ring, columns):
            return stream.select(ring[rows, columns], None, begin - first, stop - first)

        def run(tile):
            columns = stream.chunk_of(tile, blocks.tile)
            product = jax.lax.dot_general(
                own(x_ring, slice(None)),
                own(dy_ring, columns),
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            # Neither is set to 0 before, nor rounded in the end: both would hold up products.
            total = product + jnp.where(is_new, 0.0, sum_ref[:, columns])
            sum_ref[:, columns] = total
            dw_slots[slot, :, columns] = total.astype(dtype)

        stream.for_each(0, blocks.columns // blocks.tile, run)

    def end(p, visit, number):
        copy_dw(p, visit, jax.lax.rem(number, blocks.slots)).start()

    stream.for_visits(
        tables,
        static,
        stream.sublanes(dtype),
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
    static: stream.Static,
    vmem_limit: int,
    interpret: bool,
) -> jax.Array:
    """Returns the sums of outer products over each group's rows.

    Chunks must divide R, D and F hold `static`'s depth and columns.
    """
    (R, D), F, blocks = x_RD.shape, dy_RF.shape[1], static.blocks
    num_columns, E, dtype = pl.cdiv(F, blocks.columns), num_groups, x_RD.dtype
    return stream.call(
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
