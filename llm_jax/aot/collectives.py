"""Finds the collectives of a scheduled module: which operations begin, continue and await them."""

from collections.abc import Iterator
import dataclasses
import re

from llm_jax.aot import hlo

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Part:
    """What an operation has to do with a collective.

    Attributes:
      kind: as XLA calls it; a sum of which each chip keeps its part is a "reduce-scatter".
      phase: "whole" where it is begun and awaited at once, "start", or "done". What the compiler moves
        along during a product ("async collective fusion") is neither: it is that product.
      key: the same of a start and its done.
      num_bytes: of the array as it is before it is scattered or after it is gathered; of a scattered
        result alone where `is_scattered_size`; between slices, of what one chip sends; of rows whose
        number is data, what an even load moves.
      attributes: of the collective itself, where its groups stand.
    """

    kind: str
    phase: str
    key: str
    num_bytes: int
    is_scattered_size: bool
    attributes: str


def part_of(module: hlo.Module, operation: hlo.Operation) -> Part | None:
    """Returns what an operation has to do with a collective, or None where it has nothing."""
    opcode = operation.opcode
    if is_between_slices(operation):
        return _between_slices(operation)
    kind, _, suffix = _split(opcode)
    if kind in KINDS:
        phase = suffix or "whole"
        key = operation.operands[0] if phase == "done" else operation.name
        return _part(kind, phase, key, operation, module)
    if opcode == "async-done":
        return Part("", "done", operation.operands[0], 0, False, "")
    if opcode not in ("fusion", "async-start"):
        return None
    inner = next(_inside(module, operation), None)
    if inner is None:
        return None
    kind, _, _ = _split(inner.opcode)
    if opcode == "async-start":
        return _part(kind, "start", operation.name, inner, module)
    channel = re.search(r"channel_id=(\d+)", inner.attributes)
    key = f"channel {channel[1]}" if channel else operation.name
    if operation.name.startswith("async-collective-start"):
        return _part(kind, "start", key, inner, module)
    if operation.name.startswith("async-collective-done"):
        return _part(kind, "done", key, inner, module)
    if (operation.called("calls") or "").startswith("async_collective_fusion"):
        return None
    if operation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    whole = _part(kind, "whole", key, inner, module)
    return dataclasses.replace(whole, is_scattered_size=inner.opcode.startswith("reduce-scatter"))


def is_between_slices(operation: hlo.Operation) -> bool:
    """Returns whether an operation is one of the four by which hosts exchange what chips have summed."""
    is_transfer = operation.opcode in ("send", "recv", "send-done", "recv-done")
    return is_transfer and "xla_megascale_runtime" in operation.attributes


def _between_slices(operation: hlo.Operation) -> Part | None:
    """Returns the part of an exchange that what comes back has in it; what is sent has none."""
    if operation.opcode == "recv-done":
        return Part("", "done", operation.operands[0], 0, False, "")
    if operation.opcode != "recv":
        return None
    named = re.search(r'_xla_megascale_transfer_type="(\w+)"', operation.attributes)
    kind = named[1].lower().replace("_", "-") if named else "recv"
    return Part(
        kind, "start", operation.name, operation.types[0].num_bytes, False, operation.attributes
    )


def _split(opcode: str) -> tuple[str, str, str]:
    for suffix in ("start", "done"):
        if opcode.endswith(f"-{suffix}"):
            return opcode.removesuffix(f"-{suffix}"), "-", suffix
    return opcode, "", ""


def _operand_bytes(module: hlo.Module, operation: hlo.Operation, index: int) -> int:
    """Returns the bytes of an operand; names are unique within a computation alone."""
    values = next(
        values for values in module.by_name.values() if values.get(operation.name) is operation
    )
    return sum(array.num_bytes for array in values[operation.operands[index]].types)


def _inside(module: hlo.Module, operation: hlo.Operation) -> Iterator[hlo.Operation]:
    called = operation.called("calls")
    for inner in module.computations.get(called, ()):
        if _split(inner.opcode)[0] in KINDS:
            yield inner
        elif inner.opcode in ("fusion", "call"):
            yield from _inside(module, inner)


def _part(kind: str, phase: str, key: str, operation: hlo.Operation, module: hlo.Module) -> Part:
    # A start lists operands, results and what the hardware needs.
    arrays = [
        array for array in operation.types if array.shape or array.dtype not in ("u32", "s32")
    ]
    if operation.opcode in ("all-gather-start", "collective-permute-start") and len(arrays) > 1:
        arrays = arrays[len(arrays) // 2 :]
    num_bytes = sum(array.num_bytes for array in arrays)
    if kind == "ragged-all-to-all" and phase != "done":
        # How much moves is data. Rows that go out fill what they come from, and rows that come back what
        # they go to: the other one has room for uneven loads, which an even load leaves empty.
        num_bytes = min(_operand_bytes(module, operation, index) for index in (0, 1))
    return Part(kind, phase, key, num_bytes, kind == "reduce-scatter", operation.attributes)
