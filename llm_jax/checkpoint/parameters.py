"""Checkpoints of parameters alone: what is generated with, evaluated and trained further, not resumed."""

from typing import Any

from etils import epath
import orbax.checkpoint as ocp

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import trees
from llm_jax.checkpoint import contents
from llm_jax.checkpoint import folder
from llm_jax.checkpoint import meta as meta_lib


def check_new(workdir: str) -> None:
    """Checks that a folder has no checkpoints.

    Raises:
      errors.UserError: it has.
    """
    known = folder.steps(folder.directory(workdir))
    if known:
        raise errors.UserError(f"{workdir} has checkpoints already ({known}): use another folder")


def save_params(
    workdir: str,
    config: config_lib.RunConfig,
    tokenizer: dict[str, Any],
    params: dict[str, Any],
    source: dict[str, Any] | None = None,
) -> epath.Path:
    """Writes parameters as the checkpoint of step 0; returns its folder when it is whole.

    Args:
      workdir: that has no checkpoints yet.
      config: of the model.
      tokenizer: as `Tokenizer.to_dict` makes it.
      params: nested dicts by name, of arrays on a mesh.
      source: where they came from, for `Meta.source`.

    Raises:
      errors.UserError: the folder has checkpoints.
    """
    check_new(workdir)
    parts = {contents.PARAMS: params}
    meta = meta_lib.Meta(
        step=0,
        config=config,
        tokenizer=tokenizer,
        versions=meta_lib.code_version(),
        fingerprints=trees.fingerprints(parts),
        eval_loss=None,
        arrays=contents.of_tree(parts),
        mesh=contents.mesh_of(parts),
        source=source,
    )
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta_lib.make_record(meta))
    )
    step_dir = folder.directory(workdir) / str(meta.step)
    # Orbax writes beside it and renames.
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(step_dir, args=args)
    return step_dir
