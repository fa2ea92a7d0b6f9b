"""The folder of a run's checkpoints: which steps there are, and the one that a reader asks for."""

from collections.abc import Callable
import logging
import math
from typing import TypeVar

from etils import epath
import orbax.checkpoint as ocp

from llm_jax import distributed
from llm_jax import errors
from llm_jax.checkpoint import meta as meta_lib

NAME = "checkpoints"  # in the workdir
BEST = "best"  # as a step: the one with the lowest evaluation loss

_T = TypeVar("_T")

_LOG = logging.getLogger(__name__)


def directory(workdir: str) -> epath.Path:
    """Returns the folder of a run's checkpoints; `workdir` may be local or `gs://`."""
    return epath.Path(workdir).expanduser().absolute() / NAME


def steps(checkpoint_dir: epath.Path) -> list[int]:
    """Returns the steps that were saved whole, in ascending order."""
    if not checkpoint_dir.exists():
        return []
    return sorted(ocp.utils.checkpoint_steps(checkpoint_dir))


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


def read_latest(
    workdir: str, step: int | str | None, read: Callable[[epath.Path, meta_lib.Meta], _T]
) -> _T:
    """Returns `read(folder, meta)` of a step, or of the latest or best one that is whole.

    Args:
      workdir: of the run.
      step: from `parse_step`.
      read: what to do with it; a DamagedError sends it to the next candidate.

    Raises:
      errors.UserError: there is no such checkpoint, or it is damaged; says which there are.
    """
    checkpoint_dir = directory(workdir)
    known = distributed.gather(steps(checkpoint_dir))[0]
    if not known:
        raise errors.UserError(f"--workdir={workdir} has no checkpoints under {checkpoint_dir}")
    if step == BEST:
        candidates = by_eval_loss(checkpoint_dir, known)
    elif step is None:
        candidates = known[::-1]
    elif step in known:
        candidates = [step]
    else:
        raise errors.UserError(f"--step={step}: {checkpoint_dir} has steps {known}")
    for candidate in distributed.gather(candidates)[0]:
        step_dir = checkpoint_dir / str(candidate)
        try:
            with meta_lib.damage_agreed():
                meta = meta_lib.read_meta(step_dir)
            return read(step_dir, meta)
        except meta_lib.DamagedError as error:
            _LOG.warning("checkpoint %s is damaged and left out: %s", step_dir, error)
    raise errors.UserError(f"no checkpoint asked for under {checkpoint_dir} is whole (see above)")


def by_eval_loss(checkpoint_dir: epath.Path, known: list[int]) -> list[int]:
    """Returns those of the `known` steps that were evaluated when they were saved, best first.

    Raises:
      errors.UserError: none was.
    """
    losses = {}
    for step in known:
        try:
            loss = meta_lib.read_meta(checkpoint_dir / str(step)).eval_loss
        except meta_lib.DamagedError as error:
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
