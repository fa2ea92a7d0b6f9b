"""What a checkpoint says of itself: its record, read and written beside the arrays."""

import dataclasses
import hashlib
from importlib import metadata
import json
import pathlib
import shutil
import subprocess
from typing import Any

from etils import epath
import orbax.checkpoint as ocp

import llm_jax
from llm_jax import config as config_lib
from llm_jax import errors

FORMAT_VERSION = 1

# What Orbax and TensorStore raise on files that are missing, cut short or changed.
DAMAGE = (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, EOFError)


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


def read_meta(step_dir: epath.Path) -> Meta:
    """Reads what a checkpoint says of itself.

    Raises:
      DamagedError: it cannot be read.
      errors.UserError: it was written by a newer version.
    """
    try:
        raw = checkpointer().restore(
            step_dir, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )["meta"]
        is_newer, checksum = raw["format"] > FORMAT_VERSION, raw.pop("checksum", None)
    except DAMAGE as error:
        raise DamagedError(one_line(error)) from error
    if is_newer:
        raise errors.UserError(
            f"{step_dir} has checkpoint format {raw['format']}; this llm_jax reads up to"
            f" {FORMAT_VERSION}: update it"
        )
    if checksum != checksum_of(raw):
        raise DamagedError("what it says of itself is not what was saved (checksum differs)")
    return Meta(
        step=raw["step"],
        config=config_lib.from_dict(raw["config"]),
        tokenizer=raw["tokenizer"],
        versions=raw["versions"],
        fingerprints=raw["fingerprints"],
        eval_loss=raw["eval_loss"],
    )


def checksum_of(raw: dict[str, Any]) -> str:
    """Returns the SHA-256 of a record as JSON with sorted keys, itself left out."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def checkpointer() -> ocp.Checkpointer:
    """Returns what reads the parts of one step."""
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def one_line(error: BaseException) -> str:
    """Returns what an error says as one line of bounded length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
