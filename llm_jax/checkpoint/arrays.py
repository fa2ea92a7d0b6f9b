"""The arrays of a checkpoint, read onto any mesh and held to their fingerprints."""

from typing import TYPE_CHECKING
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from llm_jax import trees
from llm_jax.checkpoint import meta as meta_lib

if TYPE_CHECKING:  # sampling reads checkpoints and must not import the trainer
    from llm_jax import train_step


def split(state: "train_step.TrainState") -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the parts `params` and `training` of a state, as nested dicts by name."""
    training = {
        "step": state.step,
        "num_skipped": state.num_skipped,
        "opt_state": trees.to_nested(state.opt_state),
    }
    return trees.to_nested(state.model), training


def on_mesh(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Gives each leaf a sharding on real devices; under a mesh, eval_shape knows only its names."""

    def on_devices(leaf):
        # A scalar that no sharded array went into carries no sharding: it is replicated.
        spec = jax.sharding.PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        sharding = jax.sharding.NamedSharding(mesh, spec)
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
    try:
        arrays = meta_lib.checkpointer().restore(step_dir, args=ocp.args.Composite(**args))
        arrays = {name: arrays[name] for name in targets}
    except Exception as error:
        # Orbax wraps what TensorStore raises in a bare Exception. What is no damage (memory that
        # runs out) goes on as it is: it must not make a good checkpoint look bad.
        cause = error.__cause__ if type(error) is Exception else error
        if not isinstance(cause, meta_lib.DAMAGE):
            raise
        raise meta_lib.DamagedError(meta_lib.one_line(cause)) from error
    for path, value in trees.fingerprints(arrays).items():
        if meta.fingerprints.get(path) != value:
            raise meta_lib.DamagedError(f"array {path} is not what was saved (fingerprint differs)")
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
    """
    targets = {"params": trees.to_nested(on_mesh(model, mesh))}
    return trees.from_nested(model, read_arrays(step_dir, meta, targets)["params"])
