"""What a checkpoint says of itself: its record, read and written beside the arrays.

The record holds a checksum of its own. What Orbax notes beside the arrays (`_sharding`) has none,
and a restore does without; so shapes, dtypes and shardings are recorded here as well.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import hashlib
from importlib import metadata
import json
import math
import pathlib
import shutil
import subprocess
from typing import Any

from etils import epath
import jax.numpy as jnp
import orbax.checkpoint as ocp

import llm_jax
from llm_jax import config as config_lib
from llm_jax import distributed
from llm_jax import errors

FORMAT_VERSION = 1
META = "meta"  # the part of a checkpoint that holds the record

# What Orbax and TensorStore raise on files that are missing, cut short or changed.
_DAMAGE = (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, EOFError)


class DamagedError(Exception):
    """A checkpoint cannot be read, or its arrays are not those that were saved."""


# Mesh axes of each dimension, as a PartitionSpec has them.
Spec = tuple[str | tuple[str, ...] | None, ...]


@dataclasses.dataclass(frozen=True)
class ArrayInfo:
    """An array without its values.

    Attributes:
      shape: of the whole array, on however many devices it lies.
      dtype: its name.
      spec: how it was sharded; None where that was not recorded.
    """

    shape: tuple[int, ...]
    dtype: str
    spec: Spec | None = None

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * jnp.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


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
      arrays: by their paths; None in checkpoints of before they were recorded.
      mesh: size of each axis that they were saved from; None where that was not recorded.
      source: what the parameters were converted from (`convert`); None if they were trained here.
      labels: names of classes by their number; None where a model has none.
      chat: `chat.Template.to_dict()` of a run; None where it has none.
    """

    step: int
    config: config_lib.RunConfig
    tokenizer: dict[str, Any]
    versions: dict[str, str]
    fingerprints: dict[str, int]
    eval_loss: float | None
    arrays: dict[str, ArrayInfo] | None = None
    mesh: dict[str, int] | None = None
    source: dict[str, Any] | None = None
    labels: list[str] | None = None
    chat: dict[str, Any] | None = None


def make_record(meta: Meta) -> dict[str, Any]:
    """Returns what is written of `meta`, as JSON takes it."""
    raw = {"format": FORMAT_VERSION} | {
        field.name: getattr(meta, field.name) for field in dataclasses.fields(meta)
    }
    raw["config"] = config_lib.to_dict(meta.config)
    raw["arrays"] = {path: dataclasses.asdict(info) for path, info in meta.arrays.items()}
    return raw | {"checksum": _checksum(raw)}


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
    with telling_damage():
        raw = checkpointer().restore(
            step_dir, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )["meta"]
        is_newer, checksum = raw["format"] > FORMAT_VERSION, raw.pop("checksum", None)
    if is_newer:
        raise errors.UserError(
            f"{step_dir} has checkpoint format {raw['format']}; this llm_jax reads up to"
            f" {FORMAT_VERSION}: update it"
        )
    if checksum != _checksum(raw):
        raise DamagedError("what it says of itself is not what was saved (checksum differs)")
    return Meta(
        step=raw["step"],
        config=_config(step_dir, raw),
        tokenizer=raw["tokenizer"],
        versions=raw["versions"],
        fingerprints=raw["fingerprints"],
        eval_loss=raw["eval_loss"],
        arrays=_arrays(raw["arrays"]) if "arrays" in raw else None,
        mesh=raw["mesh"] if "mesh" in raw else None,
        source=raw["source"] if "source" in raw else None,
        labels=raw["labels"] if "labels" in raw else None,
        chat=raw["chat"] if "chat" in raw else None,
    )


def _config(step_dir: epath.Path, raw: dict[str, Any]) -> config_lib.RunConfig:
    try:
        return config_lib.from_dict(raw["config"])
    except errors.UserError as error:
        raise errors.UserError(
            f"{step_dir} was saved by {describe_versions(raw['versions'])}, whose config this one"
            f" ({describe_versions(code_version())}) does not take: {error}"
        ) from error


def _arrays(raw: dict[str, Any]) -> dict[str, ArrayInfo]:
    return {
        path: ArrayInfo(tuple(info["shape"]), info["dtype"], as_spec(info["spec"]))
        for path, info in raw.items()
    }


def as_spec(raw: Any) -> Spec | None:
    """Returns a spec whose tuples may have come back as lists."""
    if raw is None:
        return None
    return tuple(tuple(axes) if isinstance(axes, (list, tuple)) else axes for axes in raw)


def describe_versions(versions: Mapping[str, str]) -> str:
    """Returns `llm_jax 0.1.0 (commit abc1234)`."""
    commit = f" (commit {versions['commit']})" if "commit" in versions else ""
    return f"llm_jax {versions['llm_jax']}{commit}"


def _checksum(raw: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def checkpointer() -> ocp.Checkpointer:
    """Returns what reads the parts of one step.

    It waits for no other process: damage may be seen by one of them alone (`damage_agreed`).
    """
    this = distributed.process_id()
    options = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}"
    )
    composite = ocp.CompositeOptions(multiprocessing_options=options)
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(composite_options=composite),
        multiprocessing_options=options,
    )


@contextlib.contextmanager
def damage_agreed() -> Iterator[None]:
    """Makes a DamagedError of one process one of all, so that all turn to the same checkpoint."""
    damage = None
    try:
        yield
    except DamagedError as error:
        damage = error
    seen = distributed.gather(None if damage is None else str(damage))
    if damage is not None:
        raise damage
    for index, text in enumerate(seen):
        if text is not None:
            raise DamagedError(f"process {index}: {text}")


@contextlib.contextmanager
def telling_damage() -> Iterator[None]:
    """Turns what Orbax raises on damaged files into a DamagedError of one line."""
    try:
        yield
    except Exception as error:
        # Orbax wraps what TensorStore raises in a bare Exception. What is no damage (memory that
        # runs out) goes on as it is: it must not make a good checkpoint look bad.
        cause = error.__cause__ if type(error) is Exception else error
        if not isinstance(cause, _DAMAGE):
            raise
        text = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise DamagedError(text) from error
