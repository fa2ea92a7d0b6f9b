"""Reads a scheduled HLO module: which operations run, how often, and what constants they are given."""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import math
import re

import numpy as np

HBM = 0  # memory spaces, as layouts number them
VMEM = 1


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array.

    Attributes:
      minor_to_major: dimensions, from the one whose neighbours lie closest in memory.
      tiles: sizes of the first tiling, () if there is none; `is_tiled_twice` if parts of a tile are
        tiled again, as types narrower than 32 bits are.
    """

    dtype: str
    shape: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tiles: tuple[int, ...]
    is_tiled_twice: bool
    memory_space: int

    @property
    def num_bytes(self) -> int:
        return math.ceil(math.prod(self.shape) * _num_bits(self.dtype) / 8)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of a computation.

    Attributes:
      types: its result's arrays; those of a tuple in order, whatever the nesting.
      operands: names, in the same computation.
      literal: what stands in the brackets of a constant or parameter.
      attributes: the rest of the line.
    """

    name: str
    opcode: str
    types: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    def called(self, role: str) -> str | None:
        """Returns the computation that plays a role ("body", "calls", "to_apply"), if there is one."""
        match = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        return match and match[1]

    @property
    def trip_count(self) -> int | None:
        """How often a while loop runs, where the compiler knows."""
        match = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(match[1]) if match else None

    @property
    def estimated_cycles(self) -> int | None:
        """What the compiler's own model says; it is 10 to 30% too slow on products."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else None

    @property
    def scoped_vmem_bytes(self) -> int:
        """VMEM that the operation has for itself while it runs."""
        match = re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', self.attributes)
        entries = match[1].split("}") if match else ()
        sizes = [re.search(r'"size":"(\d+)"', e) for e in entries if f'space":"{VMEM}"' in e]
        return sum(int(size[1]) for size in sizes if size)

    @property
    def is_kernel(self) -> bool:
        """Whether it is a Pallas kernel."""
        return self.opcode == "custom-call" and 'target="tpu_custom_call"' in self.attributes


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_CONSTANT = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = \S+ constant\((.*?)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_TILE = re.compile(r"T\(([\d,]+)\)(\()?")
_SPACE = re.compile(r"S\((\d+)\)")

# What passes an array on as it is, so that a constant may be looked for behind it.
# A number that is broadcast is a constant too; a longer one does not have the size that is asked for.
_PASSING = {"broadcast", "copy", "copy-start", "copy-done", "bitcast", "reshape", "opt-barrier"}


def _num_bits(dtype: str) -> int:
    if dtype in ("pred", "token", "opaque"):
        return 8 if dtype == "pred" else 0
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


class Module:
    """A scheduled module.

    Attributes:
      computations: operations in the order of the schedule, by the name of the computation.
      by_name: the same operations, by computation and name.
      entry: the name of the one that runs.
    """

    def __init__(self, text: str, literals: str = ""):
        """Reads a module.

        Args:
          text: of an executable, which leaves out long constants.
          literals: text of the same module in which they stand.
        """
        self.computations: dict[str, list[Operation]] = {}
        self.entry = ""
        name = None
        lines = []
        for line in text.splitlines():
            if match := _HEADER.match(line):
                name = match[2]
                self.entry = name if match[1] else self.entry
                self.computations[name] = lines = []
            elif name is not None and _START.match(line):
                lines.append(line)
            elif lines and not line.startswith("}"):
                lines[-1] += line  # attributes may go over several lines
        self.computations = {
            name: [parse_operation(line) for line in lines]
            for name, lines in self.computations.items()
        }
        self._literals = {
            match[1]: match[2] for match in map(_CONSTANT.match, literals.splitlines()) if match
        }
        self.by_name = {
            name: {operation.name: operation for operation in operations}
            for name, operations in self.computations.items()
        }
        self._loops = {
            operation.called("body"): (name, operation)
            for name, operations in self.computations.items()
            for operation in operations
            if operation.opcode == "while"
        }

    def constant_operands(self, computation: str, operation: Operation) -> dict[int, list[int]]:
        """Returns the 32-bit words, in memory's order, of those operands that are constants.

        Constants are followed through copies and into loops that hand them round unchanged. Those of
        other than 32-bit integers are left out.
        """
        constants = {}
        for index, name in enumerate(operation.operands):
            constant = self._constant(computation, name)
            source = self.by_name[computation][name]
            if constant is not None and source.types:
                literal = self._literals.get(constant.name, constant.literal)
                if constant.opcode == "iota":  # what the compiler makes of 0, 1, 2, ...
                    literal = _counted(constant)
                found = words(literal, source.types[0])
                if found is not None:
                    constants[index] = found
        return constants

    def result_of(self, computation: str, name: str) -> tuple[str, int]:
        """Returns which operation's which result `name` is, behind what passes it on unchanged."""
        operation, index = self.by_name[computation][name], 0
        while operation.opcode in (*_PASSING, "get-tuple-element") and operation.operands:
            if operation.opcode == "broadcast":
                break
            if operation.opcode == "get-tuple-element":
                index = int(re.search(r"index=(\d+)", operation.attributes)[1])
            operation = self.by_name[computation][operation.operands[0]]
        return operation.name, index

    def _constant(self, computation: str, name: str, index: int | None = None) -> Operation | None:
        """Returns the constant that `name`, or its tuple's element `index`, is a copy of."""
        operation = self.by_name[computation].get(name)
        while operation is not None:
            if operation.opcode in ("constant", "iota"):
                return operation if index is None else None
            if operation.opcode == "tuple" and index is not None:
                name, index = operation.operands[index], None
            elif operation.opcode == "get-tuple-element":
                name = operation.operands[0]
                index = int(re.search(r"index=(\d+)", operation.attributes)[1])
            elif operation.opcode in _PASSING:
                name = operation.operands[0]
            elif (
                operation.opcode == "parameter" and computation in self._loops and index is not None
            ):
                outside = self._unchanged(computation, operation.name, index)
                if outside is None:
                    return None
                computation, name = outside
            else:
                return None
            operation = self.by_name[computation].get(name)
        return None

    def _unchanged(self, body: str, parameter: str, index: int) -> tuple[str, str] | None:
        """Returns where a loop takes an element from that its body hands on as it got it."""
        root = next(operation for operation in self.computations[body] if operation.is_root)
        if root.opcode != "tuple":
            return None
        handed_on = self.by_name[body][root.operands[index]]
        is_same = handed_on.opcode == "get-tuple-element" and handed_on.operands == (parameter,)
        if not is_same or f"index={index}" not in re.split(r"[,\s]+", handed_on.attributes):
            return None
        outside, loop = self._loops[body]
        return outside, loop.operands[0]


def _counted(iota: Operation) -> str:
    """Returns the values of an iota as a constant's literal has them."""
    shape = iota.types[0].shape
    dimension = int(re.search(r"iota_dimension=(\d+)", iota.attributes)[1])
    along = np.arange(shape[dimension]).reshape([-1] + [1] * (len(shape) - 1 - dimension))
    return ", ".join(map(str, np.broadcast_to(along, shape).reshape(-1).tolist()))


def parse_operation(line: str) -> Operation:
    """Returns the operation of a line `%name = type opcode(operands), attributes`."""
    start = _START.match(line)
    rest = line[start.end() :]
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.index(" ")
    types, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    opcode = rest[:opening]
    return Operation(
        name=start[2],
        opcode=opcode,
        types=tuple(_parse_types(types)),
        operands=() if opcode in ("constant", "parameter") else tuple(_NAME.findall(inside)),
        literal=inside if opcode in ("constant", "parameter") else "",
        attributes=rest[closing + 1 :],
        is_root=start[1] is not None,
    )


def _closing(text: str, opening: int) -> int:
    """Returns where the bracket at `opening` is closed."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"brackets do not match: {text[opening : opening + 80]!r}")


def _parse_types(text: str) -> Iterator[Array]:
    for dtype, shape, layout in _ARRAY.findall(text):
        order, _, rest = layout.partition(":")
        tile = _TILE.search(rest)
        space = _SPACE.search(rest)
        yield Array(
            dtype,
            integers(re.sub(r"[<=]", "", shape)),
            integers(order),
            integers(tile[1]) if tile else (),
            bool(tile and tile[2]),
            int(space[1]) if space else HBM,
        )


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def words(literal: str, array: Array) -> list[int] | None:
    """Returns the words of an array of 32-bit integers as they lie in memory, else None."""
    if array.dtype not in ("s32", "u32") or array.is_tiled_twice:
        return None
    values = np.array([int(x) for x in re.findall(r"-?\d+", literal)], np.int64)
    if values.size != math.prod(array.shape):
        if values.size != 1:
            return None
        values = np.full(math.prod(array.shape), values[0])
    values = values.reshape(array.shape)
    if values.ndim and array.minor_to_major:
        values = values.transpose(array.minor_to_major[::-1])
    return _tiled(values, array.tiles).tolist()


def _tiled(values: np.ndarray, tiles: Sequence[int]) -> np.ndarray:
    """Returns values flat, tile after tile of the last dimensions."""
    if not tiles:
        return values.reshape(-1)
    values = values.reshape((1,) * (len(tiles) - values.ndim) + values.shape)
    first = values.ndim - len(tiles)
    padding = [(0, 0)] * first + [
        (0, -size % tile) for size, tile in zip(values.shape[first:], tiles)
    ]
    values = np.pad(values, padding)
    shape = values.shape[:first]
    for size, tile in zip(values.shape[first:], tiles):
        shape += (size // tile, tile)
    places = range(first, len(shape))
    order = (*range(first), *places[::2], *places[1::2])
    return values.reshape(shape).transpose(order).reshape(-1)
