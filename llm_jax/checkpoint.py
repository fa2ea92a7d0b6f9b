"""Checkpoints that explain themselves and restore on any mesh; the only file that imports Orbax.

    WORKDIR/checkpoints/STEP/params     the model's parameters, what sampling reads
    WORKDIR/checkpoints/STEP/training   optimiser state and counters
    WORKDIR/checkpoints/STEP/meta       config, tokenizer, code version, a fingerprint per array
    WORKDIR/checkpoints_damaged/        what could not be read, moved aside by a resuming run

Orbax writes into a temporary folder and renames it, so a save that was cut off is never seen. What
was damaged afterwards shows by the fingerprints, sums over the bits of each array that do not
depend on how it is sharded.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import hashlib
from importlib import metadata
import json
import logging
import math
import pathlib
import shutil
import subprocess
import time
from typing import TYPE_CHECKING
from typing import Any
from typing import TypeVar

from etils import epath
import jax
import orbax.checkpoint as ocp

import llm_jax
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import trees

if TYPE_CHECKING:  # sampling reads checkpoints and must not import the trainer
    from llm_jax import train_step

FORMAT_VERSION = 1
BEST = "best"  # as a step: the one with the lowest evaluation loss

# What Orbax and TensorStore raise on files that are missing, cut short or changed.
_DAMAGE = (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, EOFError)

_T = TypeVar("_T")

_LOG = logging.getLogger(__name__)


class DamagedError(Exception):
    """A checkpoint cannot be read, or its arrays are not those that were saved."""


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself.

    Attributes:
      step: updates tried.
      config: of the run.
      tokenizer: `Tokenizer.to_dict()`.
      versions: of the code and its libraries.
      fingerprints: of each array, by its path.
      eval_loss: nats a token, if the model was evaluated at this step.
    """

    step: int
    config: config_lib.RunConfig
    tokenizer: dict[str, Any]
    versions: dict[str, str]
    fingerprints: dict[str, int]
    eval_loss: float | None


def directory(workdir: str) -> epath.Path:
    """Returns the folder of a run's checkpoints; `workdir` may be local or `gs://`."""
    return epath.Path(workdir).expanduser().absolute() / "checkpoints"


def code_version() -> dict[str, str]:
    """Returns the versions of the code and of the libraries that decide its numbers."""
    versions = {name: metadata.version(name) for name in ("jax", "flax", "optax")}
    versions["llm_jax"] = llm_jax.__version__
    package = pathlib.Path(llm_jax.__file__).parent
    if shutil.which("git") and (package.parent / ".git").exists():
        command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty"]
        described = subprocess.run(command, capture_output=True, text=True, check=False)
        versions["commit"] = described.stdout.strip() or "none"
    return versions


def _abstract(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Gives each leaf a sharding on real devices; under a mesh, eval_shape knows only its names."""

    def on_devices(leaf):
        # A scalar that no sharded array went into carries no sharding: it is replicated.
        spec = jax.sharding.PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(on_devices, tree)


def _split(state: "train_step.TrainState") -> tuple[dict[str, Any], dict[str, Any]]:
    training = {
        "step": state.step,
        "num_skipped": state.num_skipped,
        "opt_state": trees.to_nested(state.opt_state),
    }
    return trees.to_nested(state.model), training


# --- reading ------------------------------------------------------------------------------------


def read_meta(step_dir: epath.Path) -> Meta:
    """Reads what a checkpoint says of itself.

    Raises:
      DamagedError: it cannot be read.
      errors.UserError: it was written by a newer version.
    """
    try:
        raw = _checkpointer().restore(
            step_dir, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )["meta"]
        is_newer, checksum = raw["format"] > FORMAT_VERSION, raw.pop("checksum", None)
    except _DAMAGE as error:
        raise DamagedError(_one_line(error)) from error
    if is_newer:
        raise errors.UserError(
            f"{step_dir} has checkpoint format {raw['format']}; this llm_jax reads up to"
            f" {FORMAT_VERSION}: update it"
        )
    if checksum != _checksum(raw):
        raise DamagedError("what it says of itself is not what was saved (checksum differs)")
    return Meta(
        step=raw["step"],
        config=config_lib.from_dict(raw["config"]),
        tokenizer=raw["tokenizer"],
        versions=raw["versions"],
        fingerprints=raw["fingerprints"],
        eval_loss=raw["eval_loss"],
    )


def _checksum(raw: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _read_arrays(step_dir: epath.Path, meta: Meta, targets: dict[str, Any]) -> dict[str, Any]:
    """Reads the named parts of a checkpoint onto the shardings of `targets` and checks them."""
    args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    try:
        arrays = _checkpointer().restore(step_dir, args=ocp.args.Composite(**args))
        arrays = {name: arrays[name] for name in targets}
    except Exception as error:
        # Orbax wraps what TensorStore raises in a bare Exception. What is no damage (memory that
        # runs out) goes on as it is: it must not make a good checkpoint look bad.
        cause = error.__cause__ if type(error) is Exception else error
        if not isinstance(cause, _DAMAGE):
            raise
        raise DamagedError(_one_line(cause)) from error
    for path, value in trees.fingerprints(arrays).items():
        if meta.fingerprints.get(path) != value:
            raise DamagedError(f"array {path} is not what was saved (fingerprint differs)")
    return arrays


def restore_params(step_dir: epath.Path, meta: Meta, model: Any, mesh: jax.sharding.Mesh) -> Any:
    """Reads the parameters alone.

    Args:
      step_dir: folder of one step.
      meta: of that step.
      model: abstract model, made under `mesh`.
      mesh: where the parameters go; any mesh, whatever they were trained on.

    Raises:
      DamagedError: they cannot be read, or are not those that were saved.
    """
    targets = {"params": trees.to_nested(_abstract(model, mesh))}
    return trees.from_nested(model, _read_arrays(step_dir, meta, targets)["params"])


def parse_step(text: str | None) -> int | str | None:
    """Returns what a `--step` flag asks for: a number, `best`, or None for the latest.

    Raises:
      errors.UserError: it is none of these.
    """
    if text is None or text == BEST:
        return text
    if not (text.isascii() and text.isdigit()):
        raise errors.UserError(f"--step={text} is no step: use a number, or {BEST}")
    return int(text)


def _by_eval_loss(checkpoint_dir: epath.Path, known: list[int]) -> list[int]:
    """Returns the steps that were evaluated when they were saved, the best first."""
    losses = {}
    for step in known:
        try:
            loss = read_meta(checkpoint_dir / str(step)).eval_loss
        except DamagedError as error:
            _LOG.warning("checkpoint %s is damaged and left out: %s", step, error)
            continue
        if loss is not None and math.isfinite(loss):
            losses[step] = loss
    if not losses:
        raise errors.UserError(
            f"--step={BEST}: no checkpoint under {checkpoint_dir} was saved at a step that was"
            " evaluated (train.eval_every); name one of its steps"
        )
    return sorted(losses, key=losses.__getitem__)


def read_latest(workdir: str, step: int | str | None, read: Callable[[epath.Path, Meta], _T]) -> _T:
    """Returns `read(folder, meta)` of a step, or of the latest or best one that is whole.

    Args:
      workdir: of the run.
      step: from `parse_step`.
      read: what to do with it; a DamagedError sends it to the next candidate.

    Raises:
      errors.UserError: there is no such checkpoint, or it is damaged; says which there are.
    """
    checkpoint_dir = directory(workdir)
    known = steps(checkpoint_dir)
    if not known:
        raise errors.UserError(f"--workdir={workdir} has no checkpoints under {checkpoint_dir}")
    if step == BEST:
        candidates = _by_eval_loss(checkpoint_dir, known)
    elif step is None:
        candidates = known[::-1]
    elif step in known:
        candidates = [step]
    else:
        raise errors.UserError(f"--step={step}: {checkpoint_dir} has steps {known}")
    for candidate in candidates:
        step_dir = checkpoint_dir / str(candidate)
        try:
            return read(step_dir, read_meta(step_dir))
        except DamagedError as error:
            _LOG.warning("checkpoint %s is damaged and left out: %s", step_dir, error)
    raise errors.UserError(f"no checkpoint asked for under {checkpoint_dir} is whole (see above)")


def steps(checkpoint_dir: epath.Path) -> list[int]:
    """Returns the steps that were saved whole, in ascending order."""
    if not checkpoint_dir.exists():
        return []
    return sorted(ocp.utils.checkpoint_steps(checkpoint_dir))


# --- the manager of a training run --------------------------------------------------------------


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

    def __init__(self, workdir: str, config: config_lib.RunConfig, tokenizer: dict[str, Any]):
        self._directory = directory(workdir)
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
                self._note_loss(step, read_meta(self._directory / str(step)).eval_loss)
            except DamagedError:
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
        params, training = _split(state)
        meta = {
            "format": FORMAT_VERSION,
            "step": step,
            "config": config_lib.to_dict(self._config),
            "tokenizer": self._tokenizer,
            "versions": code_version(),
            "fingerprints": trees.fingerprints({"params": params, "training": training}),
            "eval_loss": eval_loss,
        }
        meta["checksum"] = _checksum(meta)
        self._note_loss(step, eval_loss)
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            training=ocp.args.StandardSave(training),
            meta=ocp.args.JsonSave(meta),
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
        params, training = _split(state)
        targets = _abstract({"params": params, "training": training}, mesh)
        damaged = []
        for step in reversed(self._manager.all_steps()):
            step_dir = self._directory / str(step)
            try:
                meta = read_meta(step_dir)
                check_resumable(meta, self._config, self._tokenizer)
                arrays = _read_arrays(step_dir, meta, targets)
            except DamagedError as error:
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


def differences(saved: Any, current: Any, prefix: str) -> list[str]:
    """Returns one line for each setting that differs between two frozen configs."""
    lines = []
    for field in dataclasses.fields(saved):
        old, new = getattr(saved, field.name), getattr(current, field.name)
        name = f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(old):
            lines += differences(old, new, name)
        elif old != new:
            lines.append(f"{name}: {old!r} in the checkpoint, {new!r} now")
    return lines


def check_resumable(meta: Meta, config: config_lib.RunConfig, tokenizer: Mapping[str, Any]) -> None:
    """Checks that a run can go on from a checkpoint.

    Raises:
      errors.UserError: model, optimiser or tokenizer differ; lists the differences.
    """
    refused = differences(meta.config.model, config.model, "config.model")
    if meta.config.optim.name != config.optim.name:
        names = f"{meta.config.optim.name!r} in the checkpoint, {config.optim.name!r} now"
        refused.append(f"config.optim.name: {names}")
    if meta.tokenizer != dict(tokenizer):
        refused.append("the tokenizer is another one")
    if refused:
        raise errors.UserError(
            f"the checkpoint of step {meta.step} does not fit this config: "
            + "; ".join(refused)
            + ". Use its settings to go on, or a new --workdir to begin anew"
        )
    for line in differences(meta.config, config, "config"):
        _LOG.info("resuming with a change: %s", line)
