"""How often the loops of a scheduled module run, by computing its integer scalars."""

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


class Scope:
    """One computation with what is known of its arguments: numbers, tuples of them, None."""

    def __init__(self, module: hlo.Module, computation: str, arguments: list):
        self._module = module
        self._computation = computation
        self._arguments = arguments
        self._known = {}

    def value(self, name: str):
        """Returns the value of an operation: a number, a tuple, or None where it is not known."""
        if name not in self._known:
            operation = self._module.by_name[self._computation][name]
            self._known[name] = self._compute(operation)
        return self._known[name]

    def root(self):
        """Returns the value of the computation."""
        operations = self._module.computations[self._computation]
        return self.value(next(o.name for o in operations if o.is_root))

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
            return Scope(self._module, operation.called("calls"), arguments).root()
        if opcode in _BINARY or opcode == "compare":
            function = (
                _BINARY.get(opcode)
                or _DIRECTIONS[re.search(r"direction=(\w+)", operation.attributes)[1]]
            )
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


def entry_scope(module: hlo.Module) -> Scope:
    """Returns the scope of the entry computation, whose arguments are data."""
    num_parameters = sum(o.opcode == "parameter" for o in module.computations[module.entry])
    return Scope(module, module.entry, [None] * num_parameters)


def first_turn(module: hlo.Module, scope: Scope, loop: hlo.Operation) -> tuple[int | None, Scope]:
    """Returns how often the body of a while loop runs, and the scope of its first turn.

    Args:
      scope: of the computation where the loop stands. In a loop in a loop, of the outer one's first
        turn: the others are taken to be like it.

    Returns:
      The number of turns, None where it depends on data; the scope.
    """
    condition, body = loop.called("condition"), loop.called("body")
    state = scope.value(loop.operands[0])
    first = Scope(module, body, [state])
    if loop.trip_count is not None:
        return loop.trip_count, first
    for turn in range(MAX_TURNS):
        goes_on = Scope(module, condition, [state]).root()
        if goes_on is None:
            return None, first
        if not goes_on:
            return turn, first
        state = Scope(module, body, [state]).root()
    return None, first
