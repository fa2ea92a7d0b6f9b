"""How often the loops of a scheduled module run, by computing their integer scalars."""

from collections.abc import Callable
from collections.abc import Mapping
import operator
import re

from llm_jax.aot import hlo

MAX_TURNS = 100_000

_BINARY: Mapping[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
_DIRECTIONS = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_SAME = {"copy", "copy-start", "copy-done", "bitcast", "reshape", "convert", "opt-barrier"}


class _Scope:
    """One computation with what is known of its arguments: numbers, tuples of them, None."""

    def __init__(self, module: hlo.Module, computation: str, arguments: list):
        self._module = module
        self._operations = {o.name: o for o in module.computations[computation]}
        self._arguments = arguments
        self._known = {}

    def value(self, name: str):
        """Returns the value of an operation: a number, a tuple, or None where it is not known."""
        if name not in self._known:
            self._known[name] = self._compute(self._operations[name])
        return self._known[name]

    def root(self):
        """Returns the value of the computation."""
        return self.value(next(o.name for o in self._operations.values() if o.is_root))

    def _compute(self, operation: hlo.Operation):
        opcode, operands = operation.opcode, operation.operands
        if opcode == "parameter":
            return self._arguments[int(operation.literal)]
        if opcode == "constant":
            return _number(operation)
        if opcode == "tuple":
            return tuple(self.value(name) for name in operands)
        if opcode == "get-tuple-element":
            elements = self.value(operands[0])
            index = int(re.search(r"index=(\d+)", operation.attributes)[1])
            return elements[index] if isinstance(elements, tuple) else None
        if opcode in _SAME:
            return self.value(operands[0])
        if opcode == "fusion" and _is_scalar(operation):
            arguments = [self.value(name) for name in operands]
            return _Scope(self._module, operation.called("calls"), arguments).root()
        if opcode in _BINARY or opcode == "compare":
            function = _BINARY.get(opcode) or _DIRECTIONS[
                re.search(r"direction=(\w+)", operation.attributes)[1]
            ]
            left, right = (self.value(name) for name in operands)
            return None if None in (left, right) else int(function(left, right))
        return None


def _is_scalar(operation: hlo.Operation) -> bool:
    return len(operation.types) == 1 and not operation.types[0].shape


def _number(operation: hlo.Operation) -> int | None:
    if not _is_scalar(operation):
        return None
    if operation.literal in ("true", "false"):
        return int(operation.literal == "true")
    return int(operation.literal) if re.fullmatch(r"-?\d+", operation.literal) else None


def num_turns(module: hlo.Module, computation: str, loop: hlo.Operation) -> int | None:
    """Returns how often the body of a while loop runs, or None where that depends on data.

    Args:
      computation: where the loop stands. What comes from that one's own arguments is not known.
    """
    if loop.trip_count is not None:
        return loop.trip_count
    num_parameters = sum(o.opcode == "parameter" for o in module.computations[computation])
    state = _Scope(module, computation, [None] * num_parameters).value(loop.operands[0])
    condition, body = loop.called("condition"), loop.called("body")
    for turn in range(MAX_TURNS):
        goes_on = _Scope(module, condition, [state]).root()
        if goes_on is None:
            return None
        if not goes_on:
            return turn
        state = _Scope(module, body, [state]).root()
    return None
