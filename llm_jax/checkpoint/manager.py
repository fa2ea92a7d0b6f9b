"""The checkpoints of a training run: saved asynchronously, restored from the newest that is whole."""

import dataclasses
import logging
import math
import time
from typing import TYPE_CHECKING
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from llm_jax import config as config_lib
from llm_jax import distributed
from llm_jax import errors
from llm_jax import trees
from llm_jax.checkpoint import arrays as arrays_lib
from llm_jax.checkpoint import contents
from llm_jax.checkpoint import folder
from llm_jax.checkpoint import meta as meta_lib
from llm_jax.checkpoint import mismatch

if TYPE_CHECKING:
    from llm_jax import train_step

_LOG = logging.getLogger(__name__)


class _KeepBest:
    """Preserves the step with the lowest evaluation loss.

    Orbax has a policy for this, but forgets the losses when a run starts again.
    """

    def __init__(self):
        self.eval_losses: dict[int, float] = {}

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Answers for each checkpoint, as Orbax asks."""
        del context
        known = [info.step for info in checkpoints if info.step in self.eval_losses]
        best = min(known, key=self.eval_losses.__getitem__, default=None)
        return [info.step == best for info in checkpoints]


class Checkpoints:
    """Saves and restores the state of one run, asynchronously."""

    def __init__(
        self,
        workdir: str,
        config: config_lib.RunConfig,
        tokenizer: dict[str, Any],
        labels: list[str] | None = None,
        chat: dict[str, Any] | None = None,
    ):
        """Args: folder and config of the run; what its checkpoints tell of tokens, classes, conversations."""
        self._labels, self._chat = labels, chat
        self._directory = folder.directory(workdir)
        self._config = config
        self._tokenizer = tokenizer
        self._best = _KeepBest()
        latest = ocp.checkpoint_managers.LatestN(config.checkpoint.max_to_keep)
        keep = ocp.checkpoint_managers.AnyPreservationPolicy([latest, self._best])
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=keep, enable_async_checkpointing=True
        )
        self._manager = self._open()
        for step in self._manager.all_steps():
            try:
                self._note_loss(step, meta_lib.read_meta(self._directory / str(step)).eval_loss)
            except meta_lib.DamagedError:
                pass  # restore_latest says so, if it comes to this checkpoint

    def _note_loss(self, step: int, eval_loss: float | None) -> None:
        if eval_loss is not None and math.isfinite(eval_loss):
            self._best.eval_losses[step] = eval_loss

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self._directory, options=self._options)

    def save(self, state: "train_step.TrainState", eval_loss: float | None = None) -> None:
        """Starts saving; returns once the arrays are copied off the devices.

        Args:
          state: to be saved, under its own step.
          eval_loss: ranks the checkpoint, in nats a token; None: it is never the best.
        """
        step = int(state.step)
        params, training = contents.split(state)
        parts = {"params": params, "training": training}
        meta = meta_lib.Meta(
            step=step,
            config=self._config,
            tokenizer=self._tokenizer,
            versions=meta_lib.code_version(),
            fingerprints=trees.fingerprints(parts),
            eval_loss=eval_loss,
            arrays=contents.of_tree(parts),
            mesh=contents.mesh_of(parts),
            labels=self._labels,
            chat=self._chat,
        )
        self._note_loss(step, eval_loss)
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            training=ocp.args.StandardSave(training),
            meta=ocp.args.JsonSave(meta_lib.make_record(meta)),
        )
        self._manager.save(step, args=args, force=True)

    def latest_step(self) -> int | None:
        """Returns the newest step saved, or None."""
        return self._manager.latest_step()

    def restore_latest(
        self, state: "train_step.TrainState", mesh: jax.sharding.Mesh
    ) -> "train_step.TrainState | None":
        """Reads the newest checkpoint that is whole; older ones if the newest is damaged.

        Args:
          state: abstract state, made under `mesh`.
          mesh: of this run; the checkpoint may come from another.

        Returns:
          The state, or None where nothing was saved.

        Raises:
          errors.UserError: the model or the optimiser is not that of the checkpoint, or there are
            checkpoints and none can be read.
        """
        params, training = contents.split(state)
        targets = arrays_lib.on_mesh({"params": params, "training": training}, mesh)
        damaged = []
        # Of several processes the first one says what there is: a disk may show others less yet.
        for step in distributed.gather(sorted(self._manager.all_steps(), reverse=True))[0]:
            step_dir = self._directory / str(step)
            try:
                with meta_lib.damage_agreed():
                    meta = meta_lib.read_meta(step_dir)
                    _check_has_training(step_dir, meta)
                    saved, _ = contents.read(step_dir, meta)
                wanted = contents.of_tree(targets)
                mismatches = mismatch.compare(saved, wanted, meta.config, self._config)
                mismatch.check_resumable(meta, self._config, self._tokenizer, mismatches)
                arrays = arrays_lib.read_arrays(step_dir, meta, targets)
            except meta_lib.DamagedError as error:
                damaged.append(step_dir)
                _LOG.warning("checkpoint %s is damaged and left out: %s", step_dir, error)
                continue
            self._set_aside(damaged)
            training = arrays["training"]
            return dataclasses.replace(
                state,
                step=training["step"],
                num_skipped=training["num_skipped"],
                model=trees.from_nested(state.model, arrays["params"]),
                opt_state=trees.from_nested(state.opt_state, training["opt_state"]),
            )
        if damaged:
            raise errors.UserError(
                f"all {len(damaged)} checkpoints under {self._directory} are damaged (see the"
                " warnings above); restore them from a copy, or use a new --workdir"
            )
        return None

    def _set_aside(self, damaged: list[epath.Path]) -> None:
        """Moves damaged checkpoints out of the way of the run that will save those steps again."""
        if not damaged:
            return
        self._manager.close()
        if jax.process_index() == 0:
            aside = self._directory.with_name("checkpoints_damaged")
            aside.mkdir(parents=True, exist_ok=True)
            for step_dir in damaged:
                target = aside / f"{step_dir.name}-{int(time.time())}"
                step_dir.rename(target)
                _LOG.warning("moved %s to %s", step_dir, target)
        ocp.utils.sync_global_processes("llm_jax:set_aside")
        self._manager = self._open()

    def wait(self) -> None:
        """Returns when the last save is on disk; raises what went wrong with it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def _check_has_training(step_dir: epath.Path, meta: meta_lib.Meta) -> None:
    """Raises UserError for a checkpoint of parameters alone, such as that of a converted model."""
    if contents.TRAINING not in contents.parts(meta):
        raise errors.UserError(
            f"{step_dir} has parameters but no state of a training run, so no run can resume from it:"
            " use another --workdir"
        )
