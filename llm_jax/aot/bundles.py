"""Reads the VLIW bundles of a compiled TPU program from libtpu's text.

The pass `packed-bundles-post-ra` prints one bundle a cycle, empty ones included:

    0x34 LB: > { %s5_s1 = sadd.s32 4294967295, %s9_s15  ;;  %v2_v0 = vld [vmem:[%s7_s2] sm:$0xff] }

A bundle's instructions are issued together. Scalar ones decide how a program goes on, so they are
parsed in full; vector ones are only counted, by the unit that they occupy.
"""

from collections.abc import Iterator
import dataclasses
import enum
import functools
import pathlib
import re


class Unit(enum.IntEnum):
    """What a vector instruction occupies for a cycle, except MXU: its cycles are in `MxuWork`."""

    VALU = 0
    EUP = 1  # transcendental functions
    XLU = 2  # transposes and movements across lanes
    VECTOR_LOAD = 3
    VECTOR_STORE = 4


@dataclasses.dataclass(frozen=True)
class Operand:
    """A number, a register, or an address: the sum of an allocation, registers and a number.

    Attributes:
      is_known: whether the text was understood; the others are empty if not.
      is_negated: of a predicate register.
    """

    number: int = 0
    registers: tuple[str, ...] = ()
    allocation: str | None = None
    is_negated: bool = False
    is_known: bool = True


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A scalar instruction.

    Attributes:
      result: the register written, under the compiler's unique name, or None.
      predicate: if it does not hold, nothing happens.
      target: the bundle that a branch goes to.
      comment: the compiler's; it tells what some loads are.
    """

    result: str | None
    opcode: str
    operands: tuple[Operand, ...]
    predicate: Operand | None = None
    target: int | None = None
    comment: str = ""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What is issued in one cycle.

    Attributes:
      slots: how many vector instructions occupy each `Unit`.
      matmul_rows: of bfloat16 operands that go into matrix units.
    """

    scalars: tuple[Instruction, ...]
    slots: tuple[int, ...]
    matmul_rows: int


class FormatError(ValueError):
    """The text is not what this reader knows; another libtpu, most likely."""


_BUNDLE = re.compile(r"^\s*(?:0x([0-9a-f]+)|0)\s+(?:[A-Z]{2})?\s*:[\s>]*\{", re.M)
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_PUT_ASIDE = re.compile(r"/\*(\d+)\*/")
_INSTRUCTION = re.compile(r"(?:%(\w+) = )?([a-z][\w.]*)\s*(.*)", re.S)
_PREDICATE = re.compile(r"\((!?)%(\w+)\),?\s*")
_SELECTING = re.compile(r"\((!?)%(\w+), %(\w+)\),\s*")
_ANNOTATION = re.compile(r"\[(?:thread|resolvable):[^\]]*\]\s*")
_TARGET = re.compile(r"target bundleno = (\d+)")
_TERM = re.compile(r"#(\w+)|%(\w+)|\$?(0x[0-9a-f]+|-?\d+)")
_INDEX = re.compile(r"\bindex: (\d+)")

# Opcodes of the scalar core that begin like those of vector units.
_SCALAR_PREFIXES = ("vsync", "vpush", "vtrace", "vdelay", "vwait", "vsettm")
_EUP = ("vpow2", "vexp2", "vlog2", "vrcp", "vrsqrt", "vtanh", "verf", "vsin", "vcos", "vsigmoid")
# These work on masks, which have a slot of their own.
_MASKS = ("vmor", "vmand", "vmxor", "vmnand", "vmneg", "vmpack", "vmmov")
# Eight sublanes of a register hold so many rows of an operand type.
_ROWS = {"bf16": 16, "f32": 8, "s8": 32, "u8": 32, "f8": 32, "s4": 64, "u4": 64}


def parse(path: pathlib.Path) -> tuple[Bundle, ...]:
    """Returns the bundles of a program; the n-th is number n, which branches refer to.

    Raises:
      FormatError: bundles are missing, or an instruction cannot be read.
    """
    text = path.read_text(errors="replace")
    starts = list(_BUNDLE.finditer(text))
    if not starts:
        raise FormatError(f"{path}: no bundles")
    ends = [start.start() for start in starts[1:]] + [len(text)]
    bundles = []
    for start, end in zip(starts, ends):
        number = int(start[1] or "0", 16)
        if number != len(bundles):
            raise FormatError(f"{path}: bundle {number} follows {len(bundles) - 1}")
        bundles.append(_parse_bundle(text[start.end() : end]))
    return tuple(bundles)


def _parse_bundle(text: str) -> Bundle:
    scalars = []
    slots = [0] * len(Unit)
    matmul_rows = 0
    for part in _instructions(text):
        match = _INSTRUCTION.match(part)
        if match is None:
            raise FormatError(f"cannot read the instruction {part[:80]!r}")
        result, opcode, arguments = match.groups()
        if opcode[0] == "v" and not opcode.startswith(_SCALAR_PREFIXES):
            unit = _unit(opcode)
            if unit is not None:
                slots[unit] += 1
            matmul_rows += _matmul_rows(opcode)
        else:
            scalars.append(_parse_scalar(result, opcode, arguments))
    return Bundle(tuple(scalars), tuple(slots), matmul_rows)


def _instructions(text: str) -> Iterator[str]:
    """Yields the instructions of a bundle; comments, put aside, may hold what parts and ends them."""
    comments = []

    def put_aside(match):
        comments.append(match[0])
        return f"/*{len(comments) - 1}*/"

    if "/*" in text:
        text = _COMMENT.sub(put_aside, text)
    for part in text[: text.rindex("}")].split(";;"):
        part = part.strip()
        if comments:
            part = _PUT_ASIDE.sub(lambda match: comments[int(match[1])], part)
        if part:
            yield part


@functools.cache
def _unit(opcode: str) -> Unit | None:
    """Returns what an instruction occupies; None for matrix units, masks and taking results."""
    if opcode.startswith(("vmat", "vpop", "vlatch", "vdwg", *_MASKS)):
        return None
    if ".xlu" in opcode or ".xlane" in opcode:
        return Unit.XLU
    if opcode.startswith(_EUP):
        return Unit.EUP
    if opcode.startswith("vld"):
        return Unit.VECTOR_LOAD
    if opcode.startswith("vst") and not opcode.startswith("vstv"):
        return Unit.VECTOR_STORE
    return Unit.VALU


@functools.cache
def _matmul_rows(opcode: str) -> int:
    """Returns the rows of a product, in bfloat16's time; narrower types have more in the same."""
    if not opcode.startswith("vmatmul"):
        return 0
    if ".lmr" in opcode:
        return 8
    for part in opcode.split("."):
        for dtype, rows in _ROWS.items():
            if part.startswith(dtype):
                return rows if rows <= 16 else 16
    return 8


def _parse_scalar(result: str | None, opcode: str, text: str) -> Instruction:
    comment = " ".join(_COMMENT.findall(text))
    text = _ANNOTATION.sub("", _COMMENT.sub("", text)).strip()
    if opcode.startswith("inlined_call_operand"):
        index = _INDEX.search(text)
        if index is None:
            raise FormatError(f"an operand without index: {text[:80]!r}")
        return Instruction(result, opcode, (Operand(int(index[1])),))
    predicate = kept = None
    if match := _SELECTING.match(text):
        kept = Operand(registers=(match[3],))
    elif not (match := _PREDICATE.match(text)) and opcode == "sst":
        return _parse_store(result, opcode, text, comment)
    if match:
        predicate = Operand(registers=(match[2],), is_negated=bool(match[1]))
        text = text[match.end() :]
    if opcode.startswith("sbr"):
        target = _TARGET.search(text)
        if target is None:
            raise FormatError(f"a branch without target: {text[:80]!r}")
        return Instruction(None, opcode, (), predicate, int(target[1]))
    operands = tuple(_parse_operand(part) for part in _split(text))
    if kept is not None:
        operands = (*operands, kept)
    return Instruction(result, opcode, operands, predicate, comment=comment)


def _parse_store(result: str | None, opcode: str, text: str, comment: str) -> Instruction:
    """`sst [smem:[address]] (predicate), value`, the comma and predicate only if there is one."""
    end = text.index("]]") + 2
    address = _parse_operand(text[:end])
    rest = text[end:].strip()
    predicate = None
    if match := _PREDICATE.match(rest):
        predicate = Operand(registers=(match[2],), is_negated=bool(match[1]))
        rest = rest[match.end() :]
    return Instruction(
        result, opcode, (address, _parse_operand(rest.strip(" ,"))), predicate, comment=comment
    )


def _split(text: str) -> list[str]:
    """Splits at the commas outside of brackets."""
    if "[" not in text:
        return [part for part in text.split(",") if part.strip()]
    return [part for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


@functools.lru_cache(maxsize=1 << 16)
def _parse_operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("!%"):
        return Operand(registers=(text[2:],), is_negated=True)
    if text.startswith("%"):
        return Operand(registers=(text.split()[0][1:],))
    is_address = text.startswith("[")
    terms = _TERM.findall(text.removeprefix("[smem:").split("]")[0])
    if not terms or not (is_address or text.split()[0] == terms[0][2]):
        return Operand(is_known=False)
    if not is_address:
        return Operand(
            int(terms[0][2], 0)
        )  # what follows says where the sum that it is part of points to
    numbers = sum(int(number, 0) for _, _, number in terms if number)
    registers = tuple(register for _, register, _ in terms if register)
    allocations = [allocation for allocation, _, _ in terms if allocation]
    return Operand(numbers, registers, allocations[0] if allocations else None)
