"""Devices of a TPU slice on a machine that has none: enough to lower and compile for, not to run.

`jax.experimental.topologies` describes them with the help of libtpu, the TPU compiler, which is an
ordinary wheel. It wants to hear of a TPU VM; the variables below answer for one.
"""

from collections.abc import Sequence
import dataclasses
import functools
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from llm_jax import errors
from llm_jax.aot import chips

# Without ALLOW_MULTIPLE_LIBTPU_LOAD a second process that compiles dies of libtpu's lock file; the
# others stand in for the metadata of a VM, whose absence costs a minute or a page of warnings. Any
# valid accelerator type will do, whatever slice is compiled for.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}

_EXAMPLES = "v5e:1x1, v5e:4x4, v6e:2x2, v5p:2x2x1, tpu7x:2x2x1, or 2*v5e:16x16 for two slices"
_SLICE_NAME = re.compile(r"(?:([1-9]\d*)\*)?([a-z0-9]+):(\d+(?:x\d+){1,2})")


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice, or several alike, which the hosts' network connects.

    Attributes:
      sides: chips along each side of one slice.
    """

    chip: chips.Chip
    sides: tuple[int, ...]
    num_slices: int = 1

    @property
    def num_chips(self) -> int:
        """Of all slices."""
        return self.num_slices * math.prod(self.sides)


def parse(slice_name: str) -> Slice:
    """Returns what a name means: "v5e:4x4", "v5p:2x2x1", "2*v5e:16x16".

    Raises:
      errors.UserError: a malformed name, or one of an unknown chip.
    """
    match = _SLICE_NAME.fullmatch(slice_name)
    if match is None:
        raise errors.UserError(f"'{slice_name}' is not the name of a slice; such are {_EXAMPLES}")
    sides = tuple(int(side) for side in match[3].split("x"))
    return Slice(chips.by_name(match[2]), sides, int(match[1] or 1))


def is_available() -> bool:
    """Returns whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def require_libtpu() -> None:
    """Raises `errors.UserError` with what to install if libtpu is not there."""
    if not is_available():
        raise errors.UserError(
            "compiling for TPUs needs libtpu, also on a machine without one: pip install 'llm_jax[aot]'"
        )


def chip_of(slice_name: str) -> chips.Chip:
    """Returns the chip that a slice is made of; raises `errors.UserError` for a malformed name."""
    return parse(slice_name).chip


@functools.cache
def devices(slice_name: str) -> Sequence[jax.Device]:
    """Returns the devices of a slice, for shardings and meshes of a program to compile.

    Args:
      slice_name: chip and chips along each side: "v5e:4x4", "v5p:2x2x1", a single one, "v6e:1x1", or
        several slices, "2*v5e:16x16".

    Raises:
      errors.UserError: libtpu is not installed, or it knows no such slice.
    """
    wanted = parse(slice_name)
    chip = wanted.chip
    require_libtpu()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = {}
    if chip.num_cores > 1 and chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as users of v4 have it
    if set(wanted.sides) == {1}:
        options["chips_per_host_bounds"] = [1, 1, 1]
    # libtpu takes no side for a ring unless told, and a line is gathered over by other means, at twice the
    # traffic: on v5p:4x4x4 as the sum of arrays that are zero but for one piece.
    rings = chip.rings(wanted.sides)
    options["wrap"] = [*rings, *(False,) * (3 - len(rings))]
    if wanted.num_slices > 1:
        options["num_slices"] = wanted.num_slices
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=slice_name.rpartition("*")[2], **options
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise errors.UserError(
            f"libtpu knows no slice '{slice_name}' ({reason}); such are {_EXAMPLES}"
        ) from error
    return tuple(description.devices)


def array(shape: Sequence[int], dtype, device: jax.Device) -> jax.ShapeDtypeStruct:
    """Returns the description of an array on one device, to lower a program with."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)
