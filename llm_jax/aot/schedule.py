"""The time of a whole compiled program: its schedule, replayed with the time of each operation."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import pathlib
import re

from llm_jax.aot import bundles
from llm_jax.aot import chips
from llm_jax.aot import collectives
from llm_jax.aot import hlo
from llm_jax.aot import kernel_cost
from llm_jax.aot import loops
from llm_jax.aot import machine
from llm_jax.aot import network

# Names for what is there already.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "add-dependency",
    "domain",
}
# With the host, but for those between slices.
_HOST_TRANSFERS = ("send", "recv")
_FILE = re.compile(r"\d+-(.*)-\d+-packed-bundles-post-ra\.txt")


@dataclasses.dataclass
class _Totals:
    """What is added up along the schedule.

    Attributes:
      seconds: the time reached in it.
      exposed_seconds: part of it in which nothing is done but wait for other chips.
    """

    seconds: float = 0.0
    exposed_seconds: float = 0.0
    mxu_seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0

    def add(self, other: "_Totals", times: int) -> None:
        self.seconds += times * other.seconds
        self.exposed_seconds += times * other.exposed_seconds
        self.mxu_seconds += times * other.mxu_seconds
        self.bytes_read += times * other.bytes_read
        self.bytes_written += times * other.bytes_written


class _Flights:
    """Collectives that were begun.

    Attributes:
      ends: when each one will have arrived, by its key.
    """

    def __init__(self):
        self.ends: dict[str, float] = {}
        self._free: dict[network.Link, float] = {}

    def begin(self, key: str, collective: network.Collective, now: float) -> None:
        """Begins one as soon as the links that it takes are free."""
        start = max((self._free.get(link, 0.0) for link in collective.links), default=0.0)
        end = max(now, start) + collective.seconds
        self._free.update(dict.fromkeys(collective.links, end))
        self.ends[key] = end


class Replay:
    """Goes through a scheduled module once.

    An operation takes as long as its bundles do; one that has none (it is done between the others)
    takes the compiler's estimate, and one in a loop as long as in the first turn. Copies that are
    started early share HBM among themselves, in turn, and are waited for where the schedule says so. A
    loop costs its turns times its body. What was moved cannot be moved faster than HBM allows, so that
    is the least that the program takes. Collectives take the time of `network`; those that are started
    early wait for others on the same links.
    """

    def __init__(
        self,
        module: hlo.Module,
        dump: pathlib.Path,
        chip: chips.Chip,
        links: network.Network | None = None,
    ):
        """Takes a module, what the compiler wrote of it, and what connects its devices, if anything."""
        self._module = module
        self._chip = chip
        self._links = links
        self._bandwidth = chip.hbm_bandwidth * machine.HBM_EFFICIENCY
        self._files = {
            match[1]: path for path in dump.iterdir() if (match := _FILE.fullmatch(path.name))
        }
        self._originals = _read_originals(dump)
        self._known: dict[str, kernel_cost.KernelCost] = {}
        self._executions: dict[str, int] = {}
        # What scalar code of an operation wrote into its results, by operation and result.
        self._written: dict[tuple[str, int], Sequence[int]] = {}
        self._collectives: dict[tuple[str, tuple[str, ...]], kernel_cost.CollectiveCost] = {}
        self.not_modelled: set[str] = set()

    @property
    def communication(self) -> tuple[kernel_cost.CollectiveCost, ...]:
        """What was found of each kind over each axes of the mesh, the longest first."""
        return tuple(sorted(self._collectives.values(), key=lambda cost: -cost.seconds))

    def run(self) -> tuple[_Totals, tuple[kernel_cost.KernelCost, ...]]:
        """Returns the totals, and the operations with the costliest first."""
        totals = self._replay(self._module.entry, loops.entry_scope(self._module), 1)
        moved = totals.bytes_read + totals.bytes_written
        totals.seconds = max(totals.seconds, moved / self._bandwidth)
        operations = [
            dataclasses.replace(cost, num_executions=self._executions[name])
            for name, cost in self._known.items()
        ]
        operations.sort(key=lambda cost: -cost.seconds * cost.num_executions)
        return totals, tuple(operations)

    def _replay(self, computation: str, scope: loops.Scope, times: int) -> _Totals:
        """Returns the totals of one turn of a computation, which is executed `times` times."""
        totals = _Totals()
        arrivals: dict[str, float] = {}
        flights = _Flights()
        hbm_free = 0.0
        for operation in self._module.computations[computation]:
            opcode = operation.opcode
            if opcode in _FREE:
                continue
            part = collectives.part_of(self._module, operation)
            if part is not None and (part.phase != "done" or part.key in flights.ends):
                self._communicate(part, totals, flights, times)
            elif opcode.startswith(_HOST_TRANSFERS):
                if not collectives.is_between_slices(operation):
                    self.not_modelled.add(opcode.removesuffix("-done"))
            elif opcode == "while":
                turns, inside = loops.first_turn(self._module, scope, operation)
                if turns is None:
                    self.not_modelled.add(f"turns of {operation.name} (taken as one)")
                body = operation.called("body")
                turns = 1 if turns is None else turns
                totals.add(self._replay(body, inside, times * turns), turns)
            elif opcode == "call":
                name = operation.called("to_apply")
                arguments = [scope.value(operand) for operand in operation.operands]
                inside = loops.Scope(self._module, name, arguments)
                totals.add(self._replay(name, inside, times), 1)
            elif opcode == "conditional":
                totals.add(self._costliest_branch(operation, scope, times), 1)
            elif opcode.endswith("-start"):
                read, written = _moved(operation)
                begun = max(totals.seconds, hbm_free)
                hbm_free = begun + (read + written) / self._bandwidth
                arrivals[operation.name] = hbm_free + machine.HBM_LATENCY
                totals.add(_Totals(bytes_read=read, bytes_written=written), 1)
            elif opcode.endswith("-done"):
                arrived = max((arrivals.pop(name, 0.0) for name in operation.operands), default=0.0)
                totals.seconds = max(totals.seconds, arrived)
            else:
                totals.add(self._operation(computation, scope, operation, times), 1)
        return totals

    def _communicate(
        self, part: collectives.Part, totals: _Totals, flights: "_Flights", times: int
    ) -> None:
        """Begins a collective, or waits for one, or both."""
        if part.phase != "done":
            if self._links is None:
                self.not_modelled.add(part.kind)
                return
            found = self._links.collective(part)
            flights.begin(part.key, found, totals.seconds)
            self._count(found, times)
        if part.phase != "start":
            waited = max(0.0, flights.ends.pop(part.key) - totals.seconds)
            totals.seconds += waited
            totals.exposed_seconds += waited

    def _count(self, found: network.Collective, times: int) -> None:
        key = found.kind, found.axes
        none = kernel_cost.CollectiveCost(*key, 0, 0, 0.0)
        known = self._collectives.get(key, none)
        self._collectives[key] = dataclasses.replace(
            known,
            num_executions=known.num_executions + times,
            num_bytes=known.num_bytes + times * found.num_bytes,
            seconds=known.seconds + times * found.seconds,
        )

    def _costliest_branch(
        self, operation: hlo.Operation, scope: loops.Scope, times: int
    ) -> _Totals:
        named = re.search(r"branch_computations=\{([^}]*)\}", operation.attributes)
        names = re.findall(r"%?([\w.\-]+)", named[1]) if named else []
        names += [operation.called(f"{word}_computation") for word in ("true", "false")]
        self.not_modelled.add(f"the choice of {operation.name} (the costliest was taken)")
        branches = []
        for name, operand in zip(filter(None, names), operation.operands[1:]):
            inside = loops.Scope(self._module, name, [scope.value(operand)])
            branches.append(self._replay(name, inside, times))
        return max(branches, key=lambda branch: branch.seconds)

    def _operation(
        self, computation: str, scope: loops.Scope, operation: hlo.Operation, times: int
    ) -> _Totals:
        path = self._bundles_of(operation)
        if path is None and operation.opcode == "custom-call" and not operation.is_kernel:
            return _Totals()  # another name for its operands
        name = operation.name
        if name not in self._known:
            self._known[name] = (
                self._estimate(operation, ())
                if path is None
                else self._execute(computation, scope, operation, path)
            )
        self._executions[name] = self._executions.get(name, 0) + times
        cost = self._known[name]
        mxu_seconds = cost.mxu * cost.seconds
        moved = cost.hbm_bytes_read, cost.hbm_bytes_written
        return _Totals(cost.seconds, 0.0, mxu_seconds, *moved)

    def _bundles_of(self, operation: hlo.Operation) -> pathlib.Path | None:
        """Returns the program of an operation; like operations share one."""
        name = operation.name
        return self._files.get(name) or self._files.get(self._originals.get(name, ""))

    def _execute(
        self, computation: str, scope: loops.Scope, operation: hlo.Operation, path: pathlib.Path
    ) -> kernel_cost.KernelCost:
        operands = self._module.constant_operands(computation, operation)
        for index, name in enumerate(operation.operands):
            value = scope.value(name)
            if isinstance(value, int):
                operands.setdefault(index, [value])
            words = self._written.get(self._module.result_of(computation, name))
            if words is not None:
                operands.setdefault(index, words)
        try:
            cores = machine.execute(bundles.parse(path), self._chip, operands)
        except (bundles.FormatError, machine.TooLongError) as error:
            return self._estimate(operation, (f"not executed: {error}",))
        for index, words in cores[0].written.items():
            self._written[operation.name, index - len(operation.operands)] = words
        return cost_of(operation, cores, self._chip)

    def _estimate(
        self, operation: hlo.Operation, guesses: tuple[str, ...]
    ) -> kernel_cost.KernelCost:
        """Costs an operation by the compiler's estimate or, without one, by writing its result."""
        written = sum(array.num_bytes for array in operation.types if array.memory_space == hlo.HBM)
        cycles = operation.estimated_cycles
        if cycles is None:
            guesses += ("no estimate: as long as its result takes to be read and written",)
            cycles = 2 * written / self._bandwidth * self._chip.clock_hz
        return kernel_cost.KernelCost(
            name=operation.name,
            is_kernel=operation.is_kernel,
            num_executions=0,
            seconds=cycles / self._chip.clock_hz,
            cycles=cycles,
            **dict.fromkeys(("mxu", "valu", "eup", "xlu", "vector_load", "vector_store"), 0.0),
            stall=0.0,
            hbm_bytes_read=written,
            hbm_bytes_written=written,
            vmem_bytes=operation.scoped_vmem_bytes,
            guesses=guesses,
            is_executed=False,
        )


def cost_of(
    operation: hlo.Operation, cores: list[machine.Execution], chip: chips.Chip
) -> kernel_cost.KernelCost:
    """Puts together what the cores of a device did in an operation."""
    slowest = max(cores, key=lambda core: core.cycles)
    cycles = max(slowest.cycles, 1.0)
    capacity = cycles * len(cores)

    def share(unit: bundles.Unit, slots_per_cycle: int) -> float:
        return sum(core.slots[unit] for core in cores) / slots_per_cycle / capacity

    mxu_rows = sum(core.matmul_rows for core in cores)
    return kernel_cost.KernelCost(
        name=operation.name,
        is_kernel=operation.is_kernel,
        num_executions=0,
        seconds=slowest.cycles / chip.clock_hz,
        cycles=slowest.cycles,
        mxu=mxu_rows / chip.mxu_rows_per_cycle / chip.num_mxus / capacity,
        valu=share(bundles.Unit.VALU, chip.num_valu),
        eup=share(bundles.Unit.EUP, chip.num_eup),
        xlu=share(bundles.Unit.XLU, chip.num_xlu),
        vector_load=share(bundles.Unit.VECTOR_LOAD, chip.num_vector_loads),
        vector_store=share(bundles.Unit.VECTOR_STORE, chip.num_vector_stores),
        stall=slowest.stall_cycles / cycles,
        hbm_bytes_read=sum(core.hbm_bytes_read for core in cores),
        hbm_bytes_written=sum(core.hbm_bytes_written for core in cores),
        vmem_bytes=operation.scoped_vmem_bytes,
        guesses=tuple(sorted({guess for core in cores for guess in core.guesses})),
    )


def _moved(operation: hlo.Operation) -> tuple[int, int]:
    """Returns the bytes that an asynchronous copy or slice reads from HBM and writes to it.

    Its type lists source and target, in either order, and then what the hardware needs.
    """
    arrays = [
        array for array in operation.types if array.dtype not in ("u32", "s32") or array.shape
    ]
    if len(arrays) < 2:
        return 0, 0
    size = min(array.num_bytes for array in arrays[:2])
    is_slice = "slice" in operation.opcode or operation.opcode == "async-start"
    source, target = arrays[:2] if is_slice else (arrays[1], arrays[0])
    return size * (source.memory_space == hlo.HBM), size * (target.memory_space == hlo.HBM)


def _read_originals(dump: pathlib.Path) -> Mapping[str, str]:
    """Returns, for operations whose program is another's, the name of that one."""
    originals = {}
    for path in dump.glob("*deduplication-map*"):
        key = ""
        for line in path.read_text().splitlines():
            if line.startswith("key:"):
                key = line.removeprefix("key:")
            elif line.startswith("  "):
                originals[line.strip()] = key
    return originals
