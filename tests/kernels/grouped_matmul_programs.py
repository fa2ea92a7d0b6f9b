"""The grouped matrix product as programs to compile for TPUs."""

import jax
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import mesh as mesh_lib
from llm_jax.kernels.grouped_matmul import op


def lower_gradients(devices, *, shape, dtype, implementation):
    """Product and gradients of a device's own rows and groups; `shape` is its R, D, F and E."""
    mesh = mesh_lib.make(config_lib.MeshConfig(expert=len(devices)), devices)
    cut = jax.P("expert")

    def loss(x_RD, w_EDF, sizes_E):
        product = jax.shard_map(
            lambda *arrays: op.grouped_matmul(*arrays, implementation=implementation),
            in_specs=(cut, cut, cut),
            out_specs=cut,
            check_vma=True,
        )
        return jnp.sum(jnp.square(product(x_RD, w_EDF, sizes_E).astype(jnp.float32)))

    R, D, F, E = (shape[0], *shape[1:])
    arrays = ((R, D), dtype), ((E, D, F), dtype), ((E,), "int32")
    placed = jax.NamedSharding(mesh, cut)
    structs = [
        jax.ShapeDtypeStruct((size * len(devices), *rest), kind, sharding=placed)
        for (size, *rest), kind in arrays
    ]
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*structs)
