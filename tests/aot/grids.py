"""Meshes over chips that stand on a grid: all that the times of collectives depend on."""

import types

import numpy as np


def mesh(sides, axes, num_slices=1):
    """Returns a mesh with the given axes over slices of the given sides.

    Args:
      axes: size by name; chips are numbered along the last side first.
    """
    devices = np.empty(tuple(axes.values()), object)
    places = [(s, *place) for s in range(num_slices) for place in np.ndindex(*sides)]
    devices.reshape(-1)[:] = [
        types.SimpleNamespace(coords=list(coords), slice_index=number) for number, *coords in places
    ]
    return types.SimpleNamespace(axis_names=tuple(axes), devices=devices)
