"""Programs to compile for TPUs, each a function that lowers one for the devices of a slice."""

import functools
import os
import time

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from llm_jax.aot import topology


def lower_matmul(devices, *, size):
    """XLA's product of two square matrices."""
    x_MM = topology.array((size, size), jnp.bfloat16, devices[0])
    return jax.jit(jnp.dot).lower(x_MM, x_MM)


def lower_matmuls(devices, *, size, turns):
    """A loop of products, each of the one before."""
    x_MM = topology.array((size, size), jnp.bfloat16, devices[0])

    def multiply(x_MM, y_MM):
        return jax.lax.scan(lambda x_MM, _: (x_MM @ y_MM, None), x_MM, length=turns)[0]

    return jax.jit(multiply).lower(x_MM, x_MM)


def _multiply_block(x_ref, y_ref, z_ref, sum_ref, *, num_steps):
    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == num_steps - 1)
    def _():
        z_ref[...] = sum_ref[...].astype(z_ref.dtype)


def lower_pallas_matmul(devices, *, size, block, depth, rows=None):
    """A kernel of square blocks of the result, `depth` columns of the left operand at a time."""
    rows = rows or size
    num_steps = size // depth
    kernel = pl.pallas_call(
        functools.partial(_multiply_block, num_steps=num_steps),
        grid=(rows // block[0], size // block[1], num_steps),
        in_specs=[
            pl.BlockSpec((block[0], depth), lambda i, j, k: (i, k)),
            pl.BlockSpec((depth, block[1]), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec(tuple(block), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, size), jnp.bfloat16),
        scratch_shapes=[pltpu.VMEM(tuple(block), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
    )
    x_NM = topology.array((rows, size), jnp.bfloat16, devices[0])
    y_MM = topology.array((size, size), jnp.bfloat16, devices[0])
    return jax.jit(kernel).lower(x_NM, y_MM)


def lower_gathered_product(devices):
    """A product with a matrix that is cut over all devices, as FSDP cuts weights."""
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices)
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x_NM = jax.ShapeDtypeStruct((16 * len(devices), 2048), jnp.bfloat16, sharding=placed)
    w_MM = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16, sharding=placed)

    @jax.shard_map(
        mesh=mesh, in_specs=(placed.spec, placed.spec), out_specs=placed.spec, check_vma=False
    )
    def multiply(x_NM, w_MM):
        return x_NM @ jax.lax.all_gather(w_MM, "data", tiled=True)

    return jax.jit(multiply).lower(x_NM, w_MM)


def lower_misshapen(devices):
    """A program that cannot be traced."""
    x_MN = topology.array((4, 8), jnp.float32, devices[0])
    return jax.jit(jnp.dot).lower(x_MN, x_MN)


def _sum_pages(page_ref, x_ref, y_ref):
    del page_ref
    y_ref[...] = x_ref[...]


def lower_gather(devices, *, pages, is_known):
    """A kernel that copies the blocks of a table, which the program has or is given."""
    specs = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(len(pages),),
        in_specs=[pl.BlockSpec((256, 256), lambda i, pages: (pages[i], 0))],
        out_specs=pl.BlockSpec((256, 256), lambda i, pages: (0, 0)),
    )
    kernel = pl.pallas_call(
        _sum_pages, grid_spec=specs, out_shape=jax.ShapeDtypeStruct((256, 256), jnp.float32)
    )
    x_MN = topology.array((256 * (max(pages) + 1), 256), jnp.float32, devices[0])
    if is_known:
        return jax.jit(lambda x_MN: kernel(jnp.array(pages, jnp.int32), x_MN)).lower(x_MN)
    return jax.jit(kernel).lower(topology.array((len(pages),), jnp.int32, devices[0]), x_MN)


def lower_ragged_dot(devices, *, sizes):
    """XLA's product of grouped rows: one kernel makes the tables of another."""
    x_RD = topology.array((2048, 512), jnp.bfloat16, devices[0])
    w_EDF = topology.array((len(sizes), 512, 512), jnp.bfloat16, devices[0])

    def multiply(x_RD, w_EDF):
        return jax.lax.ragged_dot(x_RD, w_EDF, jnp.array(sizes, jnp.int32))

    return jax.jit(multiply).lower(x_RD, w_EDF)


def lower_endless(devices):
    """Takes longer than anyone waits."""
    time.sleep(1e6)


def lower_and_die(devices):
    """Ends the process as libtpu does when a check of its own fails."""
    os.abort()
