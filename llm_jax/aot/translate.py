"""Turns the scalar half of a program's bundles into Python functions, one for each straight run.

A run, here a trace, goes from the target of a branch to where the program may next be entered, with
exits at the branches between. Executing the function of a trace costs a few list accesses for each
scalar instruction, and nothing for the vector ones.

Registers are those of the compiler's unique names, each written by one instruction, so the order
inside a bundle does not matter. A phi takes what the last of its sources has written: the compiler
keeps all of them in one physical register, each written just before.
"""

from collections.abc import Callable
from collections.abc import Sequence

from llm_jax.aot import bundles as bundles_lib

Trace = Callable[["object", list[int]], int]

MASK = 0xFFFFFFFF


class Unknown(int):
    """A guess at a value that the program reads but nobody knows, or what was computed from one.

    Python asks the operators of a subclass first, so what comes of an `Unknown` is one as well.

    Attributes:
      origin: where it, or the first of them, was read.
    """

    origin: str

    def __new__(cls, value: int, origin: str):
        unknown = super().__new__(cls, value)
        unknown.origin = origin
        return unknown


def _tainted(name: str):
    operator = getattr(int, name)

    def method(self, other):
        return Unknown(operator(int(self), int(other)), self.origin)

    return method


def _and(self, other):
    if type(other) is not Unknown and not other:
        return 0  # whatever the other is
    return Unknown(int(self) & int(other), self.origin)


for _name in ("add", "sub", "mul", "or", "xor", "lshift", "rshift"):
    setattr(Unknown, f"__{_name}__", _tainted(f"__{_name}__"))
    setattr(Unknown, f"__r{_name}__", _tainted(f"__r{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Unknown, f"__{_name}__", _tainted(f"__{_name}__"))
Unknown.__and__ = Unknown.__rand__ = _and
Unknown.__hash__ = int.__hash__


def signed(value: int) -> int:
    """Returns 32 bits as a signed number."""
    return (value ^ 0x80000000) - 0x80000000


def _choose(condition: int, yes: int, no: int) -> int:
    chosen = yes if condition else no
    return Unknown(chosen, condition.origin) if type(condition) is Unknown else chosen


# Opcodes by their first part; operands are 32 bits wide, predicates 0 or 1.
_EXPRESSIONS = {
    "sadd": "({0} + {1}) & M",
    "ssub": "({0} - {1}) & M",
    "smul": "({0} * {1}) & M",
    "sand": "{0} & {1}",
    "sor": "{0} | {1}",
    "sxor": "{0} ^ {1}",
    "sshll": "({0} << ({1} & 31)) & M",
    "sshrl": "{0} >> ({1} & 31)",
    "sshra": "(signed({0}) >> ({1} & 31)) & M",
    "smov": "{0}",
    "pmov": "{0}",
    "pneg": "1 - {0}",
    "pand": "{0} & {1}",
    "por": "1 - ((1 - {0}) & (1 - {1}))",
    "pnand": "1 - ({0} & {1})",
    "pnor": "(1 - {0}) & (1 - {1})",
    "pxor": "{0} ^ {1}",
    "scalar_select": "choose({0}, {1}, {2})",
}
_EXTREMES = {"smin": "<", "smax": ">"}
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}

# What a division leaves for `spop.drf`, in this order, by the compiler's comment.
_DIVISION_RESULTS = {"kDivAndRem": ("//", "%"), "kRem": ("%",), "kDiv": ("//",)}

# These may hold a program up, by a time that is not modelled.
_HOLDING_UP = ("vwait", "vdelay", "inlined_call")

# Distances between allocations in the address space made up here: SMEM, the one whose contents count,
# is addressed by words and has 2^18 of them; an operand is addressed by 512 bytes.
_ALLOCATION_STRIDE = 1 << 20
_OPERAND_BASE = 1 << 40
_OPERAND_STRIDE = 1 << 30


def operand_address(index: int) -> int:
    """Returns where the operand `index` of a program begins, in the address space made up here."""
    return _OPERAND_BASE + index * _OPERAND_STRIDE


def operand_at(address: int) -> tuple[int, int]:
    """Returns which operand an address belongs to (a negative index: none), and where in it."""
    return divmod(address - _OPERAND_BASE, _OPERAND_STRIDE)


class Translator:
    """The traces of one program, made when the program first gets there.

    Attributes:
      exits: for each way out of a trace, the bundles that were executed when it is taken.
      held_up: opcodes in the program whose time is not modelled.
    """

    def __init__(self, program: Sequence[bundles_lib.Bundle], delay_slots: int):
        self._program = program
        self._delay_slots = delay_slots
        self._registers: dict[str, int] = {}
        self._allocations: dict[str, int] = {}
        self._definitions: dict[str, bundles_lib.Instruction] = {}
        self._phi_slots: dict[str, list[int]] = {}
        self._entries: set[int] = set()
        self._fetched: dict[str, list[str]] = {}  # by division, in the order of the text
        self._traces: dict[int, Trace] = {}
        self.exits: list[tuple[int, int]] = []
        self.held_up: set[str] = set()
        for bundle in program:
            for instruction in bundle.scalars:
                self._survey(instruction)

    @property
    def num_registers(self) -> int:
        return len(self._registers)

    def _survey(self, instruction: bundles_lib.Instruction) -> None:
        if instruction.target is not None:
            self._entries.add(instruction.target)
        if instruction.opcode.startswith(_HOLDING_UP) and instruction.result is None:
            self.held_up.add(instruction.opcode)
        if instruction.result is None:
            return
        self._definitions[instruction.result] = instruction
        self._register(instruction.result)
        if instruction.opcode == "spop.drf":
            source = instruction.operands[0].registers[0]
            self._fetched.setdefault(source, []).append(instruction.result)
        if instruction.opcode == "sphi":
            slot = self._register(f"{instruction.result} incoming")
            for operand in instruction.operands:
                self._phi_slots.setdefault(operand.registers[0], []).append(slot)

    def _register(self, name: str) -> int:
        return self._registers.setdefault(name, len(self._registers))

    def trace(self, start: int) -> Trace:
        """Returns the function of the trace that begins at bundle `start`.

        It takes the machine and the registers, and returns the bundle to go on with.
        """
        if start not in self._traces:
            lines = self._lines(start)
            head = "smem, t = machine.smem, machine.time"
            source = "\n  ".join(["def trace(machine, r):", head, *lines])
            scope = {
                "M": MASK,
                "Unknown": Unknown,
                "signed": signed,
                "choose": _choose,
            }
            exec(compile(source, f"<bundle {start}>", "exec"), scope)
            self._traces[start] = scope["trace"]
        return self._traces[start]

    def _lines(self, start: int) -> list[str]:
        lines = []
        pending = []  # branches under way: the condition's variable, the last delay slot, the target
        number = start
        while number < len(self._program):
            if number != start and number in self._entries and not pending:
                break
            scalars = self._program[number].scalars
            lines += self._phis(scalars)
            for instruction in scalars:
                if instruction.opcode.startswith("sbr"):
                    name = f"taken{number}"
                    lines.append(f"{name} = {self._predicate(instruction)}")
                    pending.append((name, number + self._delay_slots, instruction))
                elif instruction.opcode != "sphi":
                    lines += self._statement(instruction, number - start)
            number += 1
            while pending and pending[0][1] < number:
                name, _, branch = pending.pop(0)
                leave = self._leave(start, number, branch.target)
                if branch.predicate is None:
                    return [*lines, *leave]
                lines.append(f"if {name}:")
                lines += [f"  {line}" for line in leave]
        return [*lines, *self._leave(start, number, number)]

    def _leave(self, start: int, end: int, target: int) -> list[str]:
        self.exits.append((start, end))
        index = len(self.exits) - 1
        return [f"machine.time = t + {end - start}", f"machine.left({index})", f"return {target}"]

    def _phis(self, scalars: Sequence[bundles_lib.Instruction]) -> list[str]:
        results = [i.result for i in scalars if i.opcode == "sphi"]
        if not results:
            return []
        targets = ", ".join(f"r[{self._registers[name]}]" for name in results)
        values = ", ".join(f"r[{self._registers[f'{name} incoming']}]" for name in results)
        lines = [f"{targets} = {values}"]
        for name in results:
            for slot in self._phi_slots.get(name, ()):
                lines.append(f"r[{slot}] = r[{self._registers[name]}]")
        return lines

    def _predicate(self, instruction: bundles_lib.Instruction) -> str:
        """Returns the expression of whether an instruction is executed, known or guessed."""
        if instruction.predicate is None:
            return "True"
        condition = self._value(instruction.predicate)
        what = f"a condition of {instruction.opcode}"
        return f"machine.decide({condition}, {what!r})"

    def _value(self, operand: bundles_lib.Operand) -> str:
        if not operand.is_known:
            return "Unknown(0, 'an operand that cannot be read')"
        number = operand.number & MASK
        if operand.allocation is not None:
            number += self._allocation(operand.allocation)
        terms = [f"r[{self._register(name)}]" for name in operand.registers]
        if operand.is_negated:
            return f"(1 - {terms[0]})"
        if not terms:
            return str(number)
        if number:
            terms.append(str(number))
        return terms[0] if len(terms) == 1 else f"({' + '.join(terms)})"

    def _allocation(self, name: str) -> int:
        known = self._allocations
        return known.setdefault(name, (len(known) + 1) * _ALLOCATION_STRIDE)

    def _statement(self, instruction: bundles_lib.Instruction, position: int) -> list[str]:
        """Returns the lines of an instruction that is issued `position` cycles into the trace."""
        opcode = instruction.opcode
        now = f"t + {position}"
        values = [self._value(operand) for operand in instruction.operands]
        lines = []
        if opcode == "sst" and instruction.predicate is not None:
            return [f"machine.store({self._value(instruction.predicate)}, {', '.join(values)})"]
        if opcode == "sst":
            lines = [f"smem[{values[0]}] = {values[1]}"]
        elif opcode == "dma.done.wait":
            lines = [f"t += machine.wait({now}, {', '.join(values)})"]
        elif opcode.startswith("dma."):
            source, target = self._spaces(instruction)
            arguments = ", ".join(values[:4])
            lines = [f"machine.start_dma({now}, {source!r}, {target!r}, {arguments})"]
        elif opcode.startswith("sdivrem"):
            return self._division(instruction, values)
        elif instruction.result is not None:
            return self._assignment(instruction, self._expression(instruction, values))
        if lines and instruction.predicate is not None:
            return [f"if {self._predicate(instruction)}:", f"  {lines[0]}"]
        return lines

    def _assignment(self, instruction: bundles_lib.Instruction, value: str) -> list[str]:
        register = f"r[{self._registers[instruction.result]}]"
        lines = [f"{register} = {value}"]
        for slot in self._phi_slots.get(instruction.result, ()):
            copied = f"r[{slot}] = {register}"
            is_selecting = instruction.opcode in ("smov", "pmov") and len(instruction.operands) == 2
            if instruction.predicate is not None and not is_selecting:
                copied = f"if {self._value(instruction.predicate)}: {copied}"
            lines.append(copied)
        return lines

    def _expression(self, instruction: bundles_lib.Instruction, values: list[str]) -> str:
        opcode = instruction.opcode
        name, _, suffix = opcode.partition(".")
        if opcode in ("smov", "pmov") and len(values) == 2:
            return f"choose({self._value(instruction.predicate)}, {values[0]}, {values[1]})"
        if name in _EXPRESSIONS:
            return _EXPRESSIONS[name].format(*values)
        if name == "scalar_lea":
            return " + ".join(values)
        if name == "int_to_ptr":
            return self._pointer(instruction.operands[0])
        if name == "sld":
            return (
                "machine.core" if "core id" in instruction.comment else f"machine.load({values[0]})"
            )
        if name == "scmp" and ".f32" not in opcode:
            return _comparison(suffix, values)
        if name in _EXTREMES:
            a, b = (f"signed({x})" if suffix.startswith("s") else x for x in values)
            return f"choose({a} {_EXTREMES[name]} {b}, {values[0]}, {values[1]})"
        if name == "inlined_call_operand":
            index = instruction.operands[0].number
            return str(operand_address(index)) if suffix else f"machine.scalar({index})"
        if opcode == "spop.drf":
            return self._division_result(instruction)
        return f"Unknown(0, {opcode!r})"

    def _pointer(self, operand: bundles_lib.Operand) -> str:
        """Returns an address from before the shift that turns it into what DMAs are told.

        The shift would push allocations apart here out of 32 bits, and nothing else reads it.
        """
        definition = self._definitions.get(operand.registers[0]) if operand.registers else None
        if definition is not None and definition.opcode.startswith("sshll"):
            return self._value(definition.operands[0])
        return self._value(operand)

    def _spaces(self, instruction: bundles_lib.Instruction) -> tuple[str, str]:
        """Returns the memories that a DMA reads and writes: hbm, vmem, smem or another's name."""
        source, has_spaces, target = instruction.opcode.removeprefix("dma.").partition("_to_")
        if has_spaces:
            return source, target
        return self._space(instruction.operands[0]), self._space(instruction.operands[2])

    def _space(self, operand: bundles_lib.Operand) -> str:
        for name in operand.registers:
            definition = self._definitions.get(name)
            if definition is not None and "." in definition.opcode:
                return definition.opcode.partition(".")[2]
        return "unknown"

    def _division(self, instruction: bundles_lib.Instruction, values: list[str]) -> list[str]:
        """Divides; what it leaves waits in registers of its own for those who fetch it."""
        operations = _DIVISION_RESULTS.get(instruction.comment.strip("/* "), ("//", "%"))
        quotient, divisor = values
        return [
            f"r[{self._register(f'{instruction.result} {place}')}] ="
            f" machine.divide({quotient}, {divisor}, {operation == '%'}, {'.s32' in instruction.opcode})"
            for place, operation in enumerate(operations)
        ]

    def _division_result(self, instruction: bundles_lib.Instruction) -> str:
        source = instruction.operands[0].registers[0]
        place = self._fetched[source].index(instruction.result)
        return f"r[{self._register(f'{source} {place}')}]"


def _comparison(suffix: str, values: list[str]) -> str:
    relation, dtype = suffix.split(".")[:2]
    if dtype == "s32" and relation not in ("eq", "ne"):
        values = [f"signed({value})" for value in values]
    # A sum is an int: what a bool is combined with would not be asked first.
    return f"({values[0]} {_COMPARISONS[relation]} {values[1]}) + 0"
