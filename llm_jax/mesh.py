"""The device mesh: five named axes, always all there, of size 1 where unused."""

from collections.abc import Sequence
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
import numpy as np

from llm_jax import config as config_lib
from llm_jax import errors

AXES = config_lib.MESH_AXES


def resolve_shape(config: config_lib.MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Returns the size of each axis with -1 replaced by what the others leave.

    Raises:
      errors.UserError: the sizes do not multiply to the number of devices.
    """
    shape = list(config.shape)
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and num_devices % known == 0:
        shape[shape.index(-1)] = num_devices // known
    if math.prod(shape) != num_devices:
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, config.shape))
        wanted = f"a multiple of {known}" if -1 in config.shape else f"{known}"
        raise errors.UserError(
            f"config.mesh ({sizes}) takes {wanted} devices and there are {num_devices}; change the"
            " sizes, or set one axis to -1 to take all that are left"
        )
    return tuple(shape)


def make_abstract(config: config_lib.MeshConfig, num_devices: int) -> AbstractMesh:
    """Returns the mesh of as many devices by its sizes alone: to trace and lower for. Raises as above."""
    shape = resolve_shape(config, num_devices)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def make(
    config: config_lib.MeshConfig, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """Returns a mesh with Explicit axes over `devices` (default: all).

    Where the devices are of several slices, `replica` runs across slices, so that only its
    gradient reduction uses the slow network.

    Raises:
      errors.UserError: the sizes do not fit the number of devices or of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = resolve_shape(config, len(devices))
    axis_types = (AxisType.Explicit,) * len(AXES)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
    if shape[0] % num_slices:
        raise errors.UserError(
            f"config.mesh.replica = {shape[0]}: there are {num_slices} slices, so it must be a"
            " multiple of that"
        )
    across = (num_slices, *(1 for _ in AXES[1:]))
    within = (shape[0] // num_slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices=devices)
    return jax.sharding.Mesh(np.asarray(grid), AXES, axis_types=axis_types)
