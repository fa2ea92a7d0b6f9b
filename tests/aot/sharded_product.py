"""Compiles a product whose operand is gathered and whose result is scattered: `... SLICE`.

A process of its own, since libtpu reads its flags once, and ends the process over one unknown to it.
Prints the collectives of the program when it has compiled.
"""

import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.aot import topology

_WIDTH = 512


def lower(slice_name: str) -> jax.stages.Lowered:
    """Lowers layers as FSDP has them: weights are gathered, gradients summed and scattered."""
    devices = topology.devices(slice_name)
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices)

    def layer(x_ND, w_DD):
        whole_DD = jax.lax.all_gather(w_DD, "data", axis=0, tiled=True)
        y_ND = jnp.tanh(x_ND @ whole_DD)
        gradient_DD = jax.lax.psum_scatter(x_ND.T @ y_ND, "data", tiled=True)
        return y_ND, gradient_DD

    @jax.jit
    @jax.shard_map(
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec(None, "data")),
        out_specs=(PartitionSpec("data"), PartitionSpec(None, "data")),
        check_vma=False,
    )
    def step(x_ND, w_LDD):
        return jax.lax.scan(layer, x_ND, w_LDD)

    def array(shape, spec):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    x_ND = array((len(devices) * _WIDTH, _WIDTH), PartitionSpec("data"))
    w_LDD = array((4, _WIDTH, _WIDTH), PartitionSpec(None, "data"))
    return step.lower(x_ND, w_LDD)


if __name__ == "__main__":
    lowered = lower(sys.argv[1])
    collectives = re.findall(r"all_gather|reduce_scatter", lowered.as_text())
    lowered.compile()
    print("compiled", *sorted(set(collectives)))
