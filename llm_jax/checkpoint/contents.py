"""Which arrays there are: in a state, in a checkpoint, and by a config. Shapes alone, no values."""

from collections.abc import Mapping
import contextlib
import functools
from typing import TYPE_CHECKING
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
import orbax.checkpoint as ocp

from llm_jax import config as config_lib
from llm_jax import mesh as mesh_lib
from llm_jax import sharding
from llm_jax import trees
from llm_jax.checkpoint import meta as meta_lib
from llm_jax.models import build

if TYPE_CHECKING:  # sampling reads checkpoints and must not import the trainer
    from llm_jax import train_step

PARAMS, TRAINING = PARTS = ("params", "training")

Arrays = dict[str, meta_lib.ArrayInfo]  # by path, the part's name first


def split(state: "train_step.TrainState") -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the parts `params` and `training` of a state, as nested dicts by name."""
    training = {
        "step": state.step,
        "num_skipped": state.num_skipped,
        "opt_state": trees.to_nested(state.opt_state),
    }
    return trees.to_nested(state.model), training


def of_tree(nested: Mapping[str, Any]) -> Arrays:
    """Returns the arrays of nested dicts by name, concrete or abstract."""
    return {
        name: meta_lib.ArrayInfo(
            tuple(leaf.shape),
            leaf.dtype.name,
            # A spec leaves trailing dimensions out where they are not sharded.
            meta_lib.as_spec(getattr(leaf.sharding, "spec", None)),
        )
        for name, leaf in trees.by_name(nested).items()
    }


def mesh_of(nested: Mapping[str, Any]) -> dict[str, int] | None:
    """Returns the axis sizes of the mesh that concrete arrays lie on; None if on none."""
    for leaf in jax.tree.leaves(nested):
        if isinstance(leaf.sharding, jax.sharding.NamedSharding):
            return dict(leaf.sharding.mesh.shape)
    return None


def of_config(config: config_lib.RunConfig, parts: tuple[str, ...] = PARTS) -> Arrays:
    """Returns the arrays that this code makes of a config. Needs no devices."""
    rules = sharding.PRESETS["dp"]  # nothing has to divide anything
    with _some_mesh():
        if TRAINING not in parts:
            model = jax.eval_shape(lambda: build.make_model(jax.random.key(0), config.model, rules))
            return of_tree({PARAMS: trees.to_nested(model)})
        from llm_jax import train_step

        state = jax.eval_shape(functools.partial(train_step.init_state, config, rules))
    params, training = split(state)
    arrays = of_tree({PARAMS: params, TRAINING: training})
    return {path: info for path, info in arrays.items() if part_of(path) in parts}


def part_of(path: str) -> str:
    """Returns the part of a checkpoint that a path lies in."""
    return path.partition("/")[0]


def parts(meta: meta_lib.Meta) -> tuple[str, ...]:
    """Returns the parts that a checkpoint has: both, but where parameters alone were saved."""
    if meta.arrays is None:
        return PARTS
    return tuple(part for part in PARTS if any(part_of(path) == part for path in meta.arrays))


def _some_mesh() -> contextlib.AbstractContextManager:
    if not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()  # JAX lets no mesh of another size be set inside of one
    num_axes = len(mesh_lib.AXES)
    return jax.sharding.use_abstract_mesh(
        AbstractMesh((1,) * num_axes, mesh_lib.AXES, axis_types=(AxisType.Explicit,) * num_axes)
    )


def read(
    step_dir: epath.Path, meta: meta_lib.Meta, parts: tuple[str, ...] = PARTS
) -> tuple[Arrays, dict[str, int] | None]:
    """Returns the arrays of a checkpoint and the axis sizes of the mesh that it was saved from.

    Raises:
      DamagedError: it has no record of them, and Orbax's cannot be read.
    """
    if meta.arrays is not None:
        arrays = {path: info for path, info in meta.arrays.items() if part_of(path) in parts}
        return arrays, meta.mesh
    return of_files(step_dir, parts)


def of_files(
    step_dir: epath.Path, parts: tuple[str, ...] = PARTS
) -> tuple[Arrays, dict[str, int] | None]:
    """Returns the same from what Orbax notes beside the arrays.

    Raises:
      DamagedError: that cannot be read.
    """
    arrays: Arrays = {}
    mesh = None
    for part in parts:
        with meta_lib.telling_damage():
            tree = ocp.StandardCheckpointHandler().metadata(step_dir / part).tree
            for path, leaf in jax.tree_util.tree_flatten_with_path({part: tree})[0]:
                saved = leaf.sharding
                is_named = isinstance(saved, ocp.metadata.NamedShardingMetadata)
                arrays[trees.name_of(path)] = meta_lib.ArrayInfo(
                    tuple(leaf.shape),
                    jnp.dtype(leaf.dtype).name,
                    meta_lib.as_spec(saved.partition_spec) if is_named else None,
                )
                if is_named and mesh is None:
                    mesh = dict(zip(saved.axis_names, map(int, saved.shape)))
    return arrays, mesh
