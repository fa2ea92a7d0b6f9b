"""Mesh shapes resolved, and refused."""

import math

import hypothesis
from hypothesis import strategies as st
import jax
import pytest

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import mesh as mesh_lib


@pytest.mark.parametrize(
    "sizes, num_devices, wanted",
    [
        ({}, 1, (1, 1, 1, 1, 1)),
        ({}, 8, (1, 8, 1, 1, 1)),
        ({"tensor": 2}, 8, (1, 4, 1, 1, 2)),
        ({"replica": 2, "seq": 2, "tensor": 2}, 8, (2, 1, 2, 1, 2)),
        ({"data": 2, "tensor": -1}, 8, (1, 2, 1, 1, 4)),
        ({"data": 1, "replica": -1}, 6, (6, 1, 1, 1, 1)),
        ({"data": 4, "seq": 2}, 8, (1, 4, 2, 1, 1)),
    ],
)
def test_shape(sizes, num_devices, wanted):
    config = config_lib.MeshConfig(**sizes)
    assert mesh_lib.resolve_shape(config, num_devices) == wanted


@pytest.mark.parametrize(
    "sizes, num_devices, parts",
    [
        ({"tensor": 3}, 8, ["tensor=3", "a multiple of 3", "8"]),
        ({"tensor": 16}, 8, ["tensor=16", "a multiple of 16", "8"]),
        ({"data": 4}, 8, ["data=4", "8", "-1"]),
        ({"data": 16}, 8, ["data=16", "8"]),
    ],
)
def test_shape_that_does_not_fit(sizes, num_devices, parts):
    with pytest.raises(errors.UserError) as error:
        mesh_lib.resolve_shape(config_lib.MeshConfig(**sizes), num_devices)
    message = str(error.value)
    assert message.startswith("config.mesh") and "\n" not in message
    assert all(part in message for part in parts), message


@hypothesis.given(
    st.tuples(*[st.integers(1, 4)] * 5), st.integers(0, 5), st.sampled_from([1, 2, 6, 8, 16, 48])
)
def test_every_shape_resolves_to_all_devices_or_is_refused(sizes, free, num_devices):
    given = dict(zip(mesh_lib.AXES, sizes))
    if free < 5:
        given[mesh_lib.AXES[free]] = -1
    known = math.prod(size for size in given.values() if size > 0)
    fits = num_devices % known == 0 if free < 5 else num_devices == known
    config = config_lib.MeshConfig(**given)
    if not fits:
        with pytest.raises(errors.UserError):
            mesh_lib.resolve_shape(config, num_devices)
        return
    shape = mesh_lib.resolve_shape(config, num_devices)
    assert math.prod(shape) == num_devices
    assert all(
        size in (given[axis], num_devices // known) for axis, size in zip(mesh_lib.AXES, shape)
    )
    assert all(size == given[axis] or given[axis] == -1 for axis, size in zip(mesh_lib.AXES, shape))


def test_mesh_has_explicit_axes_and_every_device():
    mesh = mesh_lib.make(config_lib.MeshConfig(tensor=2, seq=2))
    assert dict(mesh.shape) == {"replica": 1, "data": 2, "seq": 2, "expert": 1, "tensor": 2}
    assert mesh.axis_names == config_lib.MESH_AXES
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in jax.devices()]


def test_mesh_of_some_devices():
    devices = jax.devices()[2:6]
    mesh = mesh_lib.make(config_lib.MeshConfig(tensor=2), devices)
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in devices]
    assert mesh.shape["data"] == 2


class _SliceDevice:
    """A device of one of several slices, as far as building a mesh looks at it."""

    platform = "cpu"
    device_kind = "cpu"
    process_index = 0

    def __init__(self, number, slice_index):
        self.id, self.slice_index = number, slice_index

    def __repr__(self):
        return f"device {self.id} of slice {self.slice_index}"


def _two_slices():
    return [_SliceDevice(i, i // 4) for i in range(8)]


def test_replica_must_be_a_multiple_of_the_slices():
    with pytest.raises(errors.UserError, match="config.mesh.replica = 1: there are 2 slices"):
        mesh_lib.make(config_lib.MeshConfig(), _two_slices())


def test_replica_runs_across_slices(monkeypatch):
    monkeypatch.setattr(jax.sharding, "Mesh", lambda grid, axes, axis_types: (grid, axes))
    grid, axes = mesh_lib.make(config_lib.MeshConfig(replica=2, tensor=2), _two_slices())
    assert axes == config_lib.MESH_AXES and grid.shape == (2, 2, 1, 1, 2)
    for replica in range(2):
        assert {device.slice_index for device in grid[replica].flat} == {replica}
