"""What a program and its kernels cost on a TPU, by compiling it for one and executing its bundles.

    case = kernel_cost.Case("my_module:lower_forward", "v5e:1x1", {"length": 4096})
    (result,) = kernel_cost.costs([case])

`lower_forward(devices, length=4096)` lowers a program for the devices of the slice (`topology.array`
makes arguments that lie on one). The compiler wants its flags before it is loaded, so this happens in
a process of its own, which takes case after case.
"""

from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from llm_jax import errors
from llm_jax.aot import topology


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to cost.

    Attributes:
      target: "module:function" of what lowers it: called with the slice's devices and `arguments`, it
        returns a `jax.stages.Lowered`.
      slice_name: as `topology.devices` takes it.
      arguments: what JSON can hold.
      compiler_options: XLA's, for this program alone.
      flags: of libtpu, as `xla_flags.for_chip` makes them. It reads them once: programs with others are
        compiled by another process.
      is_executed: whether operations are timed by executing their bundles. If not, by the compiler's own
        estimates, which Pallas kernels do not have; memory and collectives are found in half the time.
    """

    target: str
    slice_name: str
    arguments: Mapping[str, object] = dataclasses.field(default_factory=dict)
    compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    flags: tuple[str, ...] = ()
    is_executed: bool = True


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """One operation: a Pallas kernel or what XLA compiled. Figures are of one execution.

    Attributes:
      num_executions: in one run of the program.
      cycles: of the core that takes longest.
      mxu, valu, eup, xlu, vector_load, vector_store: share of the unit's capacity that is used.
      stall: share of the time spent waiting for DMAs.
      vmem_bytes: that the compiler allotted to it.
      guesses: what had to be decided without being known: conditions on data, most of all. None of
        them, and the time is that of the model; else take the figures as one of several.
      is_executed: False if the figures are the compiler's own estimate, without utilisation.
    """

    name: str
    is_kernel: bool
    num_executions: int
    seconds: float
    cycles: float
    mxu: float
    valu: float
    eup: float
    xlu: float
    vector_load: float
    vector_store: float
    stall: float
    hbm_bytes_read: int
    hbm_bytes_written: int
    vmem_bytes: int
    guesses: tuple[str, ...] = ()
    is_executed: bool = True

    @property
    def is_exact(self) -> bool:
        """Whether the program was executed without a guess."""
        return self.is_executed and not self.guesses


@dataclasses.dataclass(frozen=True)
class CollectiveCost:
    """The collectives of one kind that run over the same axes of the mesh, in one run of the program.

    Attributes:
      kind: as XLA calls it: "all-gather", "reduce-scatter", ...
      axes: of the mesh; () where the groups fit none.
      num_bytes: sum of the arrays, each as it is before it is scattered or after it is gathered; between
        slices, of what one chip sends.
      seconds: that links are busy, whether something is computed meanwhile or not.
    """

    kind: str
    axes: tuple[str, ...]
    num_executions: int
    num_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a program takes on one device, in bytes.

    Attributes:
      arguments: that it is given; `aliased` of them become its results.
      temporaries: at their most.
      code: of the program.
      host: arguments, results and temporaries in the memory of the host.
    """

    arguments: int
    results: int
    aliased: int
    temporaries: int
    code: int
    host: int

    @property
    def peak(self) -> int:
        """HBM at the most, without the code."""
        return self.arguments + self.results - self.aliased + self.temporaries


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """A whole program on one device.

    Attributes:
      seconds: from its first operation to its last, copies and collectives between them included.
      exposed_seconds: part of it in which it does nothing but wait for other chips.
      hbm_bytes_read, hbm_bytes_written: of all operations and copies.
      memory: what it takes of HBM.
      mxu: share of the matrix units' time that is used.
      operations: the costliest first.
      collectives: the longest first.
      compile_seconds: what it took to compile, on this machine.
      not_modelled: what takes time on the chip and none here.
      fingerprint: of what was compiled: the lowered program, the chip, flags, the compiler's version.
    """

    case: Case
    seconds: float
    exposed_seconds: float
    hbm_bytes_read: int
    hbm_bytes_written: int
    memory: Memory
    mxu: float
    operations: tuple[KernelCost, ...]
    collectives: tuple[CollectiveCost, ...]
    compile_seconds: float
    not_modelled: tuple[str, ...]
    fingerprint: str

    @property
    def hbm_peak_bytes(self) -> int:
        """Arguments, results and temporaries at their most."""
        return self.memory.peak

    @property
    def kernels(self) -> tuple[KernelCost, ...]:
        """The Pallas kernels among the operations."""
        return tuple(operation for operation in self.operations if operation.is_kernel)

    @property
    def is_exact(self) -> bool:
        """Whether all of it is modelled, without guesses; XLA's own by 99% of the time."""
        inexact = sum(o.seconds * o.num_executions for o in self.operations if not o.is_exact)
        are_kernels = all(kernel.is_exact for kernel in self.kernels)
        return are_kernels and inexact < 0.01 * self.seconds and not self.not_modelled


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A program that was not compiled.

    Attributes:
      stage: "lowering" or "compilation".
      reason: the error's type and the beginning of its text, as one line.
      details: all of it.
    """

    case: Case
    stage: str
    reason: str
    details: str


@dataclasses.dataclass(frozen=True)
class Known:
    """A program that was not compiled, as `known` of `costs` has its fingerprint."""

    case: Case
    fingerprint: str


def costs(
    cases: Sequence[Case],
    *,
    known: Collection[str] = (),
    cache_directory: str | None = None,
    num_processes: int = 1,
    timeout_seconds: float = 900.0,
) -> list[ProgramCost | Refusal | Known]:
    """Returns what each program costs, or why there is none, in the order of `cases`.

    Args:
      cases: the programs.
      known: fingerprints of programs that need not be compiled: those give `Known`.
      cache_directory: where results are kept and looked for, by what was lowered, the compiler's
        version and this package's code.
      num_processes: to spread the cases over. Compiling is what takes the time, and a compilation
        uses several threads by itself.
      timeout_seconds: for one case. The compiler may take hours for blocks far too large.

    Raises:
      errors.UserError: libtpu is missing, or a slice or a target does not exist.
    """
    topology.require_libtpu()
    for case in cases:
        topology.chip_of(case.slice_name)
    num_processes = max(1, min(num_processes, len(cases)))
    shares = [cases[start::num_processes] for start in range(num_processes)]
    request = {"known": sorted(known), "cache_directory": cache_directory}
    with futures.ThreadPoolExecutor(num_processes) as pool:
        found = list(pool.map(lambda share: _in_turn(share, request, timeout_seconds), shares))
    return [found[index % num_processes][index // num_processes] for index in range(len(cases))]


def kernel_costs(case: Case, *, cache_directory: str | None = None) -> list[KernelCost]:
    """Returns what the Pallas kernels of one program cost, the costliest first.

    Raises:
      errors.UserError: as `costs`, and if the program is not compiled, with the reason.
    """
    (result,) = costs([case], cache_directory=cache_directory)
    if isinstance(result, Refusal):
        raise errors.UserError(f"{case.target} for {case.slice_name}: {result.reason}")
    return list(result.kernels)


def _in_turn(
    cases: Sequence[Case], request: Mapping[str, object], timeout_seconds: float
) -> list[ProgramCost | Refusal | Known]:
    """Costs cases by one worker; a case that ends it, or takes too long, is refused."""
    results = []
    while len(results) < len(cases):
        waiting = _alike(cases[len(results) :])
        with tempfile.TemporaryDirectory(prefix="llm_jax_aot_") as name:
            directory = pathlib.Path(name)
            of_cases = {"cases": [dataclasses.asdict(case) for case in waiting]}
            (directory / "request.json").write_text(json.dumps(request | of_cases))
            reason, details = _run_worker(directory, waiting[0].flags, timeout_seconds)
            answers = _read_answers(directory)
        if answers and "mistake" in answers[-1]:
            raise errors.UserError(answers[-1]["mistake"])
        results += [_decode(case, answer) for case, answer in zip(waiting, answers)]
        if len(answers) < len(waiting):
            results.append(Refusal(waiting[len(answers)], "compilation", reason, details))
    return results


def _alike(cases: Sequence[Case]) -> list[Case]:
    """Returns the first cases, as long as one process can take them."""

    def settings(case: Case) -> tuple:
        return case.flags, case.is_executed

    first = settings(cases[0])
    return list(itertools.takewhile(lambda case: settings(case) == first, cases))


def _run_worker(
    directory: pathlib.Path, flags: Sequence[str], timeout_seconds: float
) -> tuple[str, str]:
    """Runs a worker to its end; returns why there may be too few answers, and what it printed."""
    environment = os.environ | topology.ENVIRONMENT
    environment["JAX_PLATFORMS"] = "cpu"
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    environment["LIBTPU_INIT_ARGS"] = " ".join([*flags, *given.split()])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    log = directory / "stderr.txt"
    with log.open("w") as stderr:
        worker = subprocess.Popen(
            [sys.executable, "-m", "llm_jax.aot.worker", str(directory)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        is_late = _outlasts(worker, directory, timeout_seconds)
    finally:
        worker.kill()
        worker.wait()
    details = log.read_text(errors="replace")
    if is_late:
        return f"TimeoutError: not compiled within {timeout_seconds:g} s", details
    if worker.returncode > 0:
        raise RuntimeError(f"the worker failed:\n{details}")
    last = (details.strip().splitlines() or ["it said nothing"])[-1]
    return f"the compiler ended its process (signal {-worker.returncode}): {last}", details


def _outlasts(worker: subprocess.Popen, directory: pathlib.Path, timeout_seconds: float) -> bool:
    """Waits for a worker's end; returns True as soon as one of its cases takes too long."""
    num_answers, since = 0, time.monotonic()
    while True:
        try:
            worker.wait(0.1)
            return False
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if now - since > timeout_seconds:
            num_new = len(_read_answers(directory))
            if num_new == num_answers:
                return True
            num_answers, since = num_new, now


def _read_answers(directory: pathlib.Path) -> list[dict]:
    path = directory / "answers.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _decode(case: Case, answer: dict) -> ProgramCost | Refusal | Known:
    if "stage" in answer:
        return Refusal(case, **answer)
    if "known" in answer:
        return Known(case, answer["known"])
    operations = tuple(
        KernelCost(**{**fields, "guesses": tuple(fields["guesses"])})
        for fields in answer.pop("operations")
    )
    found = {
        "memory": Memory(**answer.pop("memory")),
        "not_modelled": tuple(answer.pop("not_modelled")),
        "collectives": tuple(
            CollectiveCost(**{**fields, "axes": tuple(fields["axes"])})
            for fields in answer.pop("collectives")
        ),
    }
    return ProgramCost(case, **answer, operations=operations, **found)
