"""What can be told of a checkpoint without restoring it: found out here, printed by `tables`."""

from collections.abc import Callable
import dataclasses
import math

from etils import epath
import orbax.checkpoint as ocp

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.checkpoint import arrays as arrays_lib
from llm_jax.checkpoint import contents
from llm_jax.checkpoint import folder
from llm_jax.checkpoint import meta as meta_lib
from llm_jax.checkpoint import mismatch

# Without these of Orbax's a part cannot be read. Which other files are needed differs.
_INDEX = ("_METADATA", "manifest.ocdbt")


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that a run has saved.

    Attributes:
      step: its number.
      eval_loss: nats a token; None where it was not evaluated or cannot be read.
      problem: why its record cannot be read; None if it can.
    """

    step: int
    eval_loss: float | None
    problem: str | None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A checkpoint, described.

    Attributes:
      step_dir: its folder.
      steps: all that lie beside it, itself included, in ascending order.
      meta: what it says of itself; None where that is damaged.
      arrays: by path, of all parts.
      mesh: axis sizes of the mesh it was saved from; None where that was not recorded.
      damage: a line for each thing that is not whole.
      is_verified: whether the arrays were read.
    """

    step_dir: epath.Path
    steps: tuple[Step, ...]
    meta: meta_lib.Meta | None
    arrays: contents.Arrays
    mesh: dict[str, int] | None
    damage: tuple[str, ...]
    is_verified: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A checkpoint, held against a config or another checkpoint.

    Attributes:
      against: what that is.
      mismatches: arrays that differ.
      refused: settings that a resuming run may not change, and the tokenizer, where they differ.
      settings: all that differ, by name: the checkpoint's and the other value.
    """

    against: str
    mismatches: tuple[mismatch.Mismatch, ...]
    refused: tuple[str, ...]
    settings: dict[str, tuple[object, object]]

    @property
    def fits(self) -> bool:
        return not self.mismatches and not self.refused


def find(path: str, step: int | str | None = None) -> epath.Path:
    """Returns the folder of one step.

    Args:
      path: a workdir, its checkpoints folder, or one step's folder; local or `gs://`.
      step: which one, as `folder.parse_step` gives it; None: the latest.

    Raises:
      errors.UserError: there is no such folder or step.
    """
    root = epath.Path(path).expanduser().absolute()
    if not root.is_dir():
        raise errors.UserError(f"{path} is no folder")
    if any((root / name).exists() for name in (meta_lib.META, *contents.PARTS)):
        if step is not None:
            raise errors.UserError(f"--step={step}: {path} is the folder of one step already")
        return root
    for checkpoint_dir in (root / folder.NAME, root):
        known = folder.steps(checkpoint_dir)
        if known:
            break
    else:
        raise errors.UserError(
            f"{path} has no checkpoints: use a workdir, its {folder.NAME} folder, or one step's"
        )
    if step is None:
        return checkpoint_dir / str(known[-1])
    if step == folder.BEST:
        return checkpoint_dir / str(folder.by_eval_loss(checkpoint_dir, known)[0])
    if step not in known:
        raise errors.UserError(f"--step={step}: {checkpoint_dir} has steps {known}")
    return checkpoint_dir / str(step)


def inspect(step_dir: epath.Path, verify: bool = False) -> Inspection:
    """Describes a checkpoint. Reads no arrays, unless asked to `verify` them, one by one.

    Raises:
      errors.UserError: it was written by a newer version.
    """
    damage = []
    if not ocp.utils.is_checkpoint_finalized(step_dir):
        damage.append("the save was cut off: Orbax has not marked it as whole")
    meta, arrays, mesh = None, {}, None
    try:
        meta = meta_lib.read_meta(step_dir)
    except meta_lib.DamagedError as error:
        damage.append(f"its record ({meta_lib.META}) cannot be read: {error}")
    for part in contents.PARTS if meta is None else contents.parts(meta):
        missing = [name for name in _INDEX if not (step_dir / part / name).exists()]
        damage += [f"{part}/{name} is missing" for name in missing]
    try:
        if meta is None:
            arrays, mesh = contents.of_files(step_dir)
        else:
            arrays, mesh = contents.read(step_dir, meta)
    except meta_lib.DamagedError as error:
        damage.append(f"which arrays it has cannot be read: {error}")
    if verify and meta is not None:
        damage += arrays_lib.damaged(step_dir, meta, arrays)
    beside = _steps(step_dir.parent) if step_dir.name.isdigit() else ()
    return Inspection(
        step_dir, beside, meta, arrays, mesh, tuple(damage), verify and meta is not None
    )


def _steps(checkpoint_dir: epath.Path) -> tuple[Step, ...]:
    found = []
    for step in folder.steps(checkpoint_dir):
        try:
            loss = meta_lib.read_meta(checkpoint_dir / str(step)).eval_loss
            # NaN is no JSON, and no loss to compare by.
            is_loss = loss is not None and math.isfinite(loss)
            found.append(Step(step, loss if is_loss else None, None))
        except (meta_lib.DamagedError, errors.UserError) as error:
            found.append(Step(step, None, str(error)))
    return tuple(found)


def compare(
    inspected: Inspection,
    against: str,
    load_config: Callable[[str], config_lib.RunConfig],
) -> Comparison:
    """Holds a checkpoint against a config file or another checkpoint.

    Args:
      inspected: the checkpoint; its record must be readable.
      against: `FILE.py[:arg]`, or a folder as `find` takes it.
      load_config: reads a config file.

    Raises:
      errors.UserError: there is no such file or checkpoint, or it cannot be read.
    """
    meta = inspected.meta
    parts = contents.parts(meta)
    if against.partition(":")[0].endswith(".py"):
        config, tokenizer = load_config(against), None
        wanted = contents.of_config(config, parts)
    else:
        other_dir = find(against)
        try:
            other = meta_lib.read_meta(other_dir)
            wanted, _ = contents.read(other_dir, other, parts)
        except meta_lib.DamagedError as error:
            raise errors.UserError(f"--against={against} is damaged: {error}") from error
        config, tokenizer, against = other.config, other.tokenizer, str(other_dir)
    return Comparison(
        against,
        tuple(mismatch.compare(inspected.arrays, wanted, meta.config, config)),
        tuple(mismatch.refused(meta, config, tokenizer)),
        mismatch.differing(meta.config, config),
    )
