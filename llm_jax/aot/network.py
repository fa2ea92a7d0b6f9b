"""The time of collectives: which mesh axis each one runs over, what it moves, and over which links.

Chips of a slice form a grid; along a side that is a ring a collective sends both ways round, along one
that is not it sends from end to end (rings and lines: Patarasu and Yuan 2009; on TPUs, Austin et al. 2025,
"How to Scale Your Model", section 3). Between slices data goes through the hosts' network.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools
import math
import re

import jax
import numpy as np

from llm_jax.aot import chips
from llm_jax.aot import collectives
from llm_jax.aot import hlo

# Of a link's bandwidth, which nobody reaches; what the book above uses.
_EFFICIENCY = 0.9
_HOP_SECONDS = 1e-6  # from chip to neighbouring chip
_DCN_SECONDS = 50e-6  # from slice to slice, by the hosts

_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")

Link = tuple[int, int]  # a side of the grid, and which way along it: all chips do alike
DCN: Link = (-1, 0)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation on one chip.

    Attributes:
      kind: as of `collectives.Part`.
      axes: of the mesh, that its groups run over; () if they fit none.
      num_bytes: as of `collectives.Part`, but of the whole array where it is scattered.
      seconds: by itself.
      links: that it keeps busy.
    """

    kind: str
    axes: tuple[str, ...]
    num_bytes: int
    seconds: float
    links: frozenset[Link]


class Network:
    """What connects the devices of a mesh, in the order in which a program numbers them."""

    def __init__(self, mesh: jax.sharding.Mesh, chip: chips.Chip):
        self._chip = chip
        self._axes = mesh.axis_names
        self._shape = mesh.devices.shape
        devices = list(mesh.devices.flat)
        self._places = np.array([_place(device) for device in devices])
        self._slices = np.array([getattr(device, "slice_index", 0) or 0 for device in devices])
        self._sides = self._places.max(axis=0) + 1
        self._is_ring = chip.rings(self._sides)

    def collective(self, part: collectives.Part) -> Collective:
        """Returns what a collective costs."""
        if "megascale" in part.attributes:
            return self._between_slices(part)
        if part.kind == "collective-permute":
            return self._permute(part.num_bytes, _lists(_PAIRS.search(part.attributes)[1]))
        groups = self._groups(part.attributes)
        group = max(groups, key=len)
        num_bytes = part.num_bytes * (len(group) if part.is_scattered_size else 1)
        seconds, links = self._ring_seconds(part.kind, num_bytes, group)
        return Collective(part.kind, self._axes_of(groups), num_bytes, seconds, links)

    def _groups(self, attributes: str) -> list[list[int]]:
        num_devices = math.prod(self._shape)
        if match := _MESH_GROUPS.search(attributes):
            return _mesh_groups(match[1], match[2])
        if match := _IOTA_GROUPS.search(attributes):
            sizes, sides, order = (hlo.integers(part or "") for part in match.groups())
            ids = np.arange(num_devices).reshape(sides)
            return (ids.transpose(order) if order else ids).reshape(sizes).tolist()
        if match := _LISTED_GROUPS.search(attributes):
            return _lists(match[1])
        return [list(range(num_devices))]  # what no groups mean

    def _axes_of(self, groups: Sequence[Sequence[int]]) -> tuple[str, ...]:
        """Returns the axes along which members of a group differ, if they are all of those."""
        places = np.array(np.unravel_index(groups[0], self._shape))
        varied = [axis for axis, along in enumerate(places) if len(set(along)) > 1]
        if math.prod(self._shape[axis] for axis in varied) != len(groups[0]):
            return ()
        return tuple(self._axes[axis] for axis in varied)

    # --- times ------------------------------------------------------------------------------------

    def _ring_seconds(
        self, kind: str, num_bytes: int, group: Sequence[int]
    ) -> tuple[float, frozenset[Link]]:
        if len(group) == 1:
            return 0.0, frozenset()
        num_slices = len(set(self._slices[list(group)]))
        inside = [member for member in group if self._slices[member] == self._slices[group[0]]]
        seconds, links = self._inside_seconds(kind, num_bytes, inside)
        if num_slices > 1:
            # Slices exchange what each chip of a slice holds of it, after or before the part inside.
            share = num_bytes / len(inside) * (num_slices - 1) / num_slices
            rounds = 2 if kind == "all-reduce" else 1
            seconds += rounds * (share / self._chip.dcn_bandwidth + _DCN_SECONDS)
            links |= {DCN}
        return seconds, links

    def _inside_seconds(
        self, kind: str, num_bytes: int, group: Sequence[int]
    ) -> tuple[float, frozenset[Link]]:
        """Returns the time of a collective within a slice."""
        size, places = len(group), self._places[list(group)]
        extents = places.max(axis=0) - places.min(axis=0) + 1
        sides = [side for side in range(places.shape[1]) if extents[side] > 1]
        if not sides:
            return 0.0, frozenset()
        is_ring = {
            side: self._is_ring[side] and extents[side] == self._sides[side] for side in sides
        }
        # A group whose chips are not neighbours shares its links with those between them.
        spread = math.prod(int(extents[side]) for side in sides) / size
        ways = sum(2 if is_ring[side] else 1 for side in sides)
        bandwidth = ways * self._chip.ici_bandwidth * _EFFICIENCY / spread
        hops = sum(int(extents[side]) // (2 if is_ring[side] else 1) for side in sides)
        rounds = 2 if kind == "all-reduce" else 1
        if kind.endswith("all-to-all"):
            # Half of everything crosses the middle of the longest side.
            longest = max(sides, key=lambda side: extents[side])
            cut = (2 if is_ring[longest] else 1) * size / int(extents[longest]) / spread
            seconds = num_bytes * size / 4 / (cut * self._chip.ici_bandwidth * _EFFICIENCY)
        else:
            seconds = rounds * num_bytes * (size - 1) / size / bandwidth
        links = frozenset(itertools.product(sides, (0, 1)))
        return seconds + rounds * hops * _HOP_SECONDS, links

    def _between_slices(self, part: collectives.Part) -> Collective:
        """Returns the cost of an exchange by the hosts, of what each chip sends."""
        num_slices = len(set(self._slices.tolist()))
        numbers = self._slices.reshape(self._shape)
        axes = tuple(
            name
            for axis, name in enumerate(self._axes)
            if (numbers != np.take(numbers, [0], axis)).any()
        )
        rounds = 2 if part.kind == "all-reduce" else 1
        share = part.num_bytes * (num_slices - 1) / num_slices
        seconds = rounds * (share / self._chip.dcn_bandwidth + _DCN_SECONDS)
        return Collective(part.kind, axes, part.num_bytes, seconds, frozenset({DCN}))

    def _permute(self, num_bytes: int, pairs: list[list[int]]) -> Collective:
        """Returns the cost of sending from chip to chip, dimension by dimension."""
        loads: dict[tuple, int] = {}
        hops, is_far = 0, False
        for source, target in pairs:
            if self._slices[source] != self._slices[target]:
                is_far = True
                continue
            route = self._route(tuple(self._places[source]), tuple(self._places[target]))
            hops = max(hops, len(route))
            for step in route:
                loads[step] = loads.get(step, 0) + 1
        links = {(side, way) for _, side, way in loads}
        seconds = (
            max(loads.values(), default=0) * num_bytes / (self._chip.ici_bandwidth * _EFFICIENCY)
        )
        seconds += hops * _HOP_SECONDS
        if is_far:
            seconds = max(seconds, num_bytes / self._chip.dcn_bandwidth + _DCN_SECONDS)
            links.add(DCN)
        axes = self._axes_of_pairs(pairs)
        return Collective("collective-permute", axes, num_bytes, seconds, frozenset(links))

    def _axes_of_pairs(self, pairs: list[list[int]]) -> tuple[str, ...]:
        places = np.array([np.unravel_index(pair, self._shape) for pair in pairs])
        is_varied = (places[..., 0] != places[..., 1]).any(axis=0)
        return tuple(axis for axis, varies in zip(self._axes, is_varied) if varies)

    def _route(self, source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple]:
        """Returns the links between two chips: where each starts, along which side, and which way."""
        route, place = [], list(source)
        for side, length in enumerate(self._sides):
            distance = target[side] - source[side]
            if self._is_ring[side] and abs(distance) * 2 > length:
                distance -= math.copysign(length, distance)
            for _ in range(abs(int(distance))):
                way = int(distance > 0)
                route.append((tuple(place), side, way))
                place[side] = (place[side] + (1 if way else -1)) % length
        return route


def _place(device: jax.Device) -> tuple[int, ...]:
    return tuple(device.coords)


def _mesh_groups(axes: str, chosen: str) -> list[list[int]]:
    """Returns the groups of `mesh['a'=2,'b'=4] {'b'}`; of a part of an axis, `'b':(2)2`: past 2, take 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts: Mapping[str, tuple[int, int]] = {
        name: (int(before or 1), int(size) if size else sizes[name])
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    }
    shape, taken = [], []
    for name, size in sizes.items():
        before, wanted = parts.get(name, (size, 1))
        taken.append(len(shape) + 1)
        shape += [before, wanted, size // before // wanted]
    ids = np.arange(math.prod(sizes.values())).reshape(shape)
    others = [place for place in range(len(shape)) if place not in taken]
    width = math.prod(shape[place] for place in taken)
    return ids.transpose(*others, *taken).reshape(-1, width).tolist()


def _lists(text: str) -> list[list[int]]:
    return [list(hlo.integers(inner)) for inner in re.findall(r"\{([\d,]+)\}", text)]
