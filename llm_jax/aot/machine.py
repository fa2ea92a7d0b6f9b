"""Executes the scalar half of a compiled TPU program, and counts.

One bundle takes one cycle. A DMA takes its turn on the memory's bandwidth and then a latency; waiting
for it takes what is left of that. Vector instructions are not executed: nothing that they compute
decides how long a program takes, unless it is moved to the scalar core, where it is then `Unknown`.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools

from llm_jax.aot import bundles as bundles_lib
from llm_jax.aot import chips
from llm_jax.aot import translate

# Of its published bandwidth a memory gives so much, and it answers so late. The latency made one
# published time fit (Pallas matmul of small blocks on v5e), the other is common to HBM2 and HBM3.
HBM_EFFICIENCY = 0.93
HBM_LATENCY = 370e-9  # seconds
# Between memories of one core. Nothing was fitted; such copies are small.
LOCAL_LATENCY = 100e-9
LOCAL_BYTES_PER_CYCLE = 256

GRANULE = 32  # bytes; what sizes of DMAs count
_WORD = 4
_WORDS_PER_ADDRESS = 512 // _WORD  # of an operand


class TooLongError(RuntimeError):
    """The program was not over after as many traces as were allowed."""


@dataclasses.dataclass(frozen=True)
class Execution:
    """What a program did on one core.

    Attributes:
      stall_cycles: of the cycles, those spent waiting for DMAs.
      slots: vector instructions issued, by `bundles.Unit`.
      matmul_rows: of bfloat16 operands that went into matrix units.
      guesses: what had to be decided by values that are not known, each said once.
      written: 32-bit words that scalar code computed and copied to operands, by their index.
    """

    cycles: float
    stall_cycles: float
    hbm_bytes_read: int
    hbm_bytes_written: int
    slots: tuple[int, ...]
    matmul_rows: int
    guesses: tuple[str, ...]
    written: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)


def execute(
    program: Sequence[bundles_lib.Bundle],
    chip: chips.Chip,
    operands: Mapping[int, Sequence[int]] | None = None,
    *,
    max_traces: int = 3_000_000,
) -> list[Execution]:
    """Runs a program on each core of a device.

    Args:
      program: as `bundles.parse` returns it.
      operands: 32-bit words of the operands whose contents are known, by their index, in the order
        that they have in memory. What scalar code reads of others is guessed to be 0.
      max_traces: straight runs of bundles before giving up.

    Returns:
      What each core did.

    Raises:
      TooLongError: there was no end to it.
    """
    translator = translate.Translator(program, chip.delay_slots)
    return [
        _Machine(translator, chip, operands or {}, core).run(program, max_traces)
        for core in range(chip.num_cores)
    ]


class _Machine:
    """One core's state. What is public is for the traces of `translate`."""

    def __init__(self, translator, chip, operands, core: int):
        self.time = 0.0  # cycles
        self.core = core
        self.smem = {}
        self._translator = translator
        self._operands = operands
        for index, words in operands.items():  # of those that lie in SMEM, if they do
            start = translate.operand_address(index)
            self.smem.update(zip(itertools.count(start), words))
        self._left = {}
        self._guesses = {}
        self._flags = {}  # DMAs under way by flag: when each will be done, and its size
        self._hbm_free = 0.0
        self._hbm_bytes_per_cycle = (
            chip.hbm_bandwidth * HBM_EFFICIENCY / chip.clock_hz / chip.num_cores
        )
        self._hbm_latency = HBM_LATENCY * chip.clock_hz
        self._local_latency = LOCAL_LATENCY * chip.clock_hz
        self._stall_cycles = 0.0
        self._bytes_read = self._bytes_written = 0
        self._written: dict[int, dict[int, int]] = {}  # by operand and place

    def run(self, program: Sequence[bundles_lib.Bundle], max_traces: int) -> Execution:
        for opcode in sorted(self._translator.held_up):
            self._guess(f"the time of {opcode}")
        registers = []
        trace, number = self._translator.trace, 0
        for _ in range(max_traces):
            if number >= len(program):
                break
            function = trace(number)
            if len(registers) < self._translator.num_registers:
                missing = self._translator.num_registers - len(registers)
                registers += [translate.Unknown(0, "a register")] * missing
            number = function(self, registers)
        else:
            raise TooLongError(f"no end after {max_traces} traces, at bundle {number}")
        under_way = [done for flag in self._flags.values() for done, _ in flag]
        cycles = max([self.time, *under_way])
        slots, matmul_rows = self._counts(program)
        return Execution(
            cycles,
            self._stall_cycles,
            self._bytes_read,
            self._bytes_written,
            slots,
            matmul_rows,
            tuple(self._guesses),
            {
                index: [words.get(place, 0) for place in range(max(words) + 1)]
                for index, words in self._written.items()
                if not any(type(word) is translate.Unknown for word in words.values())
            },
        )

    def _counts(self, program) -> tuple[tuple[int, ...], int]:
        """Adds up what the executed bundles hold, each as often as it was executed."""
        changes = [0] * (len(program) + 1)
        for index, times in self._left.items():
            start, end = self._translator.exits[index]
            changes[start] += times
            changes[end] -= times
        slots = [0] * len(bundles_lib.Unit)
        matmul_rows = 0
        for bundle, times in zip(program, itertools.accumulate(changes)):
            if times:
                matmul_rows += times * bundle.matmul_rows
                for unit, used in enumerate(bundle.slots):
                    slots[unit] += times * used
        return tuple(slots), matmul_rows

    def _guess(self, what: str) -> None:
        self._guesses[what] = True

    def _known(self, what: str, value: int) -> int:
        """Returns a value that decides something as a plain number; notes if it is a guess."""
        if type(value) is translate.Unknown:
            self._guess(f"{what}, by {value.origin}")
            return int(value)
        return value

    def left(self, index: int) -> None:
        """Notes that a trace was left by the exit `index`."""
        self._left[index] = self._left.get(index, 0) + 1

    def decide(self, condition: int, what: str) -> int:
        """Returns a condition; notes if it is a guess."""
        return self._known(what, condition)

    def load(self, address: int) -> int:
        """Returns a word of SMEM."""
        if type(address) is translate.Unknown:
            return translate.Unknown(0, address.origin)
        value = self.smem.get(address)
        return translate.Unknown(0, "SMEM") if value is None else value

    def store(self, condition: int, address: int, value: int) -> None:
        """Stores a word if a condition holds; if that is not known, nor is the word from then on."""
        if condition:
            self.smem[address] = value
        if type(condition) is translate.Unknown:
            self.smem[address] = translate.Unknown(self.load(address), condition.origin)

    def scalar(self, index: int) -> int:
        """Returns the operand `index`, which is a single number."""
        words = self._operands.get(index)
        if words is None:
            return translate.Unknown(0, f"operand {index}")
        return words[0] & translate.MASK

    def divide(self, dividend: int, divisor: int, is_remainder: bool, is_signed: bool) -> int:
        """Returns the quotient or the remainder, rounded towards zero."""
        origins = [x.origin for x in (dividend, divisor) if type(x) is translate.Unknown]
        if is_signed:
            dividend, divisor = translate.signed(dividend), translate.signed(divisor)
        quotient = remainder = 0
        if divisor:
            quotient, remainder = divmod(abs(int(dividend)), abs(int(divisor)))
            quotient = -quotient if (dividend < 0) != (divisor < 0) else quotient
            remainder = -remainder if dividend < 0 else remainder
        value = (remainder if is_remainder else quotient) & translate.MASK
        return translate.Unknown(value, origins[0]) if origins else value

    def start_dma(
        self, now: float, source: str, target: str, start: int, size: int, end: int, flag: int
    ) -> None:
        """Sends `size` granules from address `start` in one memory to `end` in another."""
        size = self._known("the size of a DMA", size)
        flag = self._known("the flag of a DMA", flag)
        num_bytes = size * GRANULE
        num_crossings = (source == "hbm") + (target == "hbm")
        if num_crossings:
            begun = max(now, self._hbm_free)
            self._hbm_free = begun + num_crossings * num_bytes / self._hbm_bytes_per_cycle
            done = self._hbm_free + self._hbm_latency
        else:
            done = now + self._local_latency + num_bytes / LOCAL_BYTES_PER_CYCLE
        self._bytes_read += num_bytes * (source == "hbm")
        self._bytes_written += num_bytes * (target == "hbm")
        if target == "smem":
            self._fill_smem(start, end, num_bytes // _WORD)
        elif source == "smem":
            self._keep_written(start, end, num_bytes // _WORD)
        elif "unknown" in (source, target):
            self._guess(f"a DMA from {source} to {target}")
        self._flags.setdefault(flag, []).append((done, size))

    def _fill_smem(self, start: int, end: int, num_words: int) -> None:
        index, offset = translate.operand_at(start)
        words = self._operands.get(index)
        for place in range(num_words):
            where = offset * _WORDS_PER_ADDRESS + place
            if words is None or where >= len(words):
                origin = f"operand {index}" if index >= 0 else "SMEM"
                self.smem[end + place] = translate.Unknown(0, origin)
            else:
                self.smem[end + place] = words[where] & translate.MASK

    def _keep_written(self, start: int, end: int, num_words: int) -> None:
        index, offset = translate.operand_at(end)
        if index < 0:
            return
        words = self._written.setdefault(index, {})
        for place in range(num_words):
            if start + place in self.smem:  # the end of the last granule is nobody's
                words[offset * _WORDS_PER_ADDRESS + place] = self.smem[start + place]

    def wait(self, now: float, flag: int, size: int) -> float:
        """Waits until `size` granules have arrived under a flag; returns for how long."""
        size = self._known("the size of a wait", size)
        flag = self._known("the flag of a wait", flag)
        under_way = sorted(self._flags.get(flag, ()))
        done = now
        while under_way and size > 0:
            arrival, arrived = under_way.pop(0)
            done = max(done, arrival)
            size -= arrived
        self._flags[flag] = under_way
        self._stall_cycles += done - now
        return done - now
