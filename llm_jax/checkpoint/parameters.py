"""Checkpoints of parameters alone: what is generated with and evaluated, not resumed."""

from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import trees
from llm_jax.checkpoint import contents
from llm_jax.checkpoint import folder
from llm_jax.checkpoint import meta as meta_lib

# Arrays are written in pieces, one array at a time: else the host would hold all of them once more.
_PIECE_BYTES = 1 << 24
_FILE_BYTES = 1 << 26


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
    labels: list[str] | None = None,
    chat: dict[str, Any] | None = None,
) -> epath.Path:
    """Writes parameters as the checkpoint of step 0; returns its folder when it is whole.

    Args:
      workdir: that has no checkpoints yet.
      config: of the model.
      tokenizer: as `Tokenizer.to_dict` makes it.
      params: nested dicts by name, of arrays on a mesh.
      source: where they came from, for `Meta.source`.
      labels: names of classes, for `Meta.labels`.
      chat: how conversations are written, for `Meta.chat`.

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
        labels=labels,
        chat=chat,
    )
    pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE_BYTES), params)
    args = ocp.args.Composite(
        params=ocp.args.PyTreeSave(
            params, save_args=pieces, ocdbt_target_data_file_size=_FILE_BYTES
        ),
        meta=ocp.args.JsonSave(meta_lib.make_record(meta)),
    )
    # The limit has to be above the largest array.
    limit_gb = 1.01 * max(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9
    params_handler = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=limit_gb, save_device_host_concurrent_gb=limit_gb
    )
    handlers = {contents.PARAMS: params_handler, meta_lib.META: ocp.JsonCheckpointHandler()}
    step_dir = folder.directory(workdir) / str(meta.step)
    # Orbax writes beside it and renames.
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        checkpointer.save(step_dir, args=args)
    return step_dir
