"""The arrays of a checkpoint, read onto any mesh and held to their fingerprints."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from llm_jax import trees
from llm_jax.checkpoint import contents
from llm_jax.checkpoint import meta as meta_lib
from llm_jax.checkpoint import mismatch


def on_mesh(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Gives each leaf a sharding on real devices; under a mesh, eval_shape knows only its names."""

    def on_devices(leaf):
        # A scalar that no sharded array went into carries no sharding: it is replicated.
        spec, memory = jax.sharding.PartitionSpec(), None
        if leaf.sharding is not None:
            spec, memory = leaf.sharding.spec, leaf.sharding.memory_kind
        sharding = jax.sharding.NamedSharding(mesh, spec, memory_kind=memory)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(on_devices, tree)


def read_arrays(
    step_dir: epath.Path, meta: meta_lib.Meta, targets: dict[str, Any]
) -> dict[str, Any]:
    """Reads the named parts of a checkpoint onto the shardings of `targets` and checks them.

    Raises:
      DamagedError: they cannot be read, or are not those that were saved.
    """
    args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    with meta_lib.damage_agreed(), meta_lib.telling_damage():
        arrays = meta_lib.checkpointer().restore(step_dir, args=ocp.args.Composite(**args))
        arrays = {name: arrays[name] for name in targets}
    _check_fingerprints(meta, arrays)
    return arrays


def restore_params(
    step_dir: epath.Path, meta: meta_lib.Meta, model: Any, mesh: jax.sharding.Mesh
) -> Any:
    """Reads the parameters alone.

    Args:
      step_dir: folder of one step.
      meta: of that step.
      model: abstract model, made under `mesh`.
      mesh: where the parameters go; any mesh, whatever they were trained on.

    Raises:
      DamagedError: they cannot be read, or are not those that were saved.
      errors.UserError: the model has other parameters than the checkpoint.
    """
    targets = {contents.PARAMS: trees.to_nested(on_mesh(model, mesh))}
    mismatch.check_params(step_dir, meta, contents.of_tree(targets))
    return trees.from_nested(model, read_arrays(step_dir, meta, targets)[contents.PARAMS])


def params_of(step_dir: epath.Path, meta: meta_lib.Meta) -> dict[str, meta_lib.ArrayInfo]:
    """Returns the parameters of a checkpoint, without their values, by name.

    Raises:
      DamagedError: there is no telling which it has.
    """
    saved, _ = contents.read(step_dir, meta, (contents.PARAMS,))
    return {path.partition("/")[2]: info for path, info in saved.items()}


def read_params(
    step_dir: epath.Path, meta: meta_lib.Meta, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Reads some parameters by name, onto the shardings of `targets`, and checks them.

    Raises:
      DamagedError: they cannot be read, or are not those that were saved.
    """
    item = trees.nested(targets)
    args = ocp.args.PyTreeRestore(
        item, ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    composite = ocp.args.Composite(**{contents.PARAMS: args})
    with meta_lib.damage_agreed(), meta_lib.telling_damage():
        found = meta_lib.checkpointer().restore(step_dir, args=composite)[contents.PARAMS]
    _check_fingerprints(meta, {contents.PARAMS: found})
    return trees.by_name(found)


def params_reader(
    step_dir: epath.Path, meta: meta_lib.Meta, model: Any
) -> Callable[[str], jax.Array]:
    """Returns what reads one parameter by its path, onto one device; the function raises DamagedError.

    Args:
      step_dir: folder of one step.
      meta: of that step.
      model: abstract model of its config.

    Raises:
      DamagedError, errors.UserError: as `restore_params`.
    """
    wanted = contents.of_tree({contents.PARAMS: trees.to_nested(model)})
    mismatch.check_params(step_dir, meta, wanted)

    def read(path: str) -> jax.Array:
        path = f"{contents.PARAMS}/{path}"
        value = _read_one(step_dir, path, wanted[path])
        _check_fingerprint(meta, path, value)
        return value

    return read


def _check_fingerprint(meta: meta_lib.Meta, path: str, value: jax.Array) -> None:
    # Under one name, so that arrays of a shape share a program.
    (fingerprint,) = trees.fingerprints({"array": value}).values()
    _check_same(meta, {path: fingerprint})


def _check_fingerprints(meta: meta_lib.Meta, arrays: Mapping[str, Any]) -> None:
    _check_same(meta, trees.fingerprints(arrays))


def _check_same(meta: meta_lib.Meta, fingerprints: Mapping[str, int]) -> None:
    """Raises DamagedError for an array, by its part and name, that is not the one that was saved."""
    for path, value in fingerprints.items():
        if meta.fingerprints.get(path) != value:
            raise meta_lib.DamagedError(f"array {path} is not what was saved (fingerprint differs)")


def damaged(step_dir: epath.Path, meta: meta_lib.Meta, arrays: contents.Arrays) -> list[str]:
    """Reads arrays one by one onto one device; returns a line for each that is not whole.

    Takes the memory of the largest array, and as much again to sum over its bits.
    """
    lines = []
    for path, info in arrays.items():
        try:
            value = _read_one(step_dir, path, info)
        except meta_lib.DamagedError as error:
            lines.append(f"array {path} cannot be read: {error}")
            continue
        try:
            _check_fingerprint(meta, path, value)
        except meta_lib.DamagedError as error:
            lines.append(str(error))
    return lines


def _read_one(step_dir: epath.Path, path: str, info: meta_lib.ArrayInfo) -> jax.Array:
    part, *names = path.split("/")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    item: Any = jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=device)
    for name in reversed(names):
        item = {name: item}
    args = ocp.args.PyTreeRestore(
        item, ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    with meta_lib.telling_damage():
        reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        return jax.tree.leaves(reader.restore(step_dir / part, args))[0]
