"""The training step of a config, lowered for a slice or for a mesh that exists nowhere."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from llm_jax import config as config_lib
from llm_jax import mesh as mesh_lib
from llm_jax import sharding
from llm_jax import train_step as train_step_lib
from llm_jax.data import batch as batch_lib


def abstract_batch(
    config: config_lib.RunConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> batch_lib.Batch:
    """Returns what a step reads, as shapes placed on a mesh."""
    size = (config.data.batch_size, config.data.sequence_length)
    placed = NamedSharding(mesh, sharding.axis_rules(config.mesh).act("BT"))
    dtypes = (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
    return batch_lib.Batch(*(jax.ShapeDtypeStruct(size, x, sharding=placed) for x in dtypes))


def abstract_state(config: config_lib.RunConfig) -> train_step_lib.TrainState:
    """Returns what a step updates, as shapes; a mesh must be set."""
    rules = sharding.axis_rules(config.mesh)
    return jax.eval_shape(lambda: train_step_lib.init_state(config, rules))


def train_step(devices: Sequence[jax.Device], *, config: Mapping[str, Any]) -> jax.stages.Lowered:
    """Lowers one update for the devices of a slice: a target of `kernel_cost.Case`.

    Args:
      config: as `config.to_dict` makes it.

    Raises:
      errors.UserError: a config that is wrong, or does not fit the devices.
    """
    checked = config_lib.from_dict(dict(config))
    mesh = mesh_lib.make(checked.mesh, devices)
    sharding.check(checked, mesh)

    def placed(leaf):
        # Scalars are made without a place: they are everywhere.
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        state = jax.tree.map(placed, abstract_state(checked))
        batch = abstract_batch(checked, mesh)
        return train_step_lib.make_train_step(checked).lower(state, batch)
