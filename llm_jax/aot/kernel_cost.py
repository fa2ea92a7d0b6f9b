"""What a program and its kernels cost on a TPU, by compiling it for one and executing its bundles.

    case = kernel_cost.Case("my_module:lower_forward", "v5e:1x1", {"length": 4096})
    (result,) = kernel_cost.costs([case])

`lower_forward(devices, length=4096)` lowers a program for the devices of the slice (`topology.array`
makes arguments that lie on one). The compiler wants its flags before it is loaded, so this happens in
a process of its own, which takes case after case.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

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
    """

    target: str
    slice_name: str
    arguments: Mapping[str, object] = dataclasses.field(default_factory=dict)
    compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)


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
class ProgramCost:
    """A whole program on one device.

    Attributes:
      seconds: from its first operation to its last, copies between them included.
      hbm_bytes_read, hbm_bytes_written: of all operations and copies.
      hbm_peak_bytes: arguments, results and temporaries at their most.
      mxu: share of the matrix units' time that is used.
      operations: the costliest first.
      not_modelled: what takes time on the chip and none here: collectives above all.
    """

    case: Case
    seconds: float
    hbm_bytes_read: int
    hbm_bytes_written: int
    hbm_peak_bytes: int
    mxu: float
    operations: tuple[KernelCost, ...]
    not_modelled: tuple[str, ...]

    @property
    def kernels(self) -> tuple[KernelCost, ...]:
        """The Pallas kernels among the operations."""
        return tuple(operation for operation in self.operations if operation.is_kernel)

    @property
    def is_exact(self) -> bool:
        """Whether every kernel is; what XLA made counts by its time."""
        inexact = sum(o.seconds * o.num_executions for o in self.operations if not o.is_exact)
        return all(kernel.is_exact for kernel in self.kernels) and inexact < 0.01 * self.seconds


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A program that was not compiled.

    Attributes:
      stage: "lowering" or "compilation".
      reason: the first line of the error, with its type.
      details: all of it.
    """

    case: Case
    stage: str
    reason: str
    details: str


def costs(
    cases: Sequence[Case], *, cache_directory: str | None = None, num_processes: int = 1
) -> list[ProgramCost | Refusal]:
    """Returns what each program costs, or why there is none, in the order of `cases`.

    Args:
      cache_directory: where results are kept and looked for, by what was lowered, the compiler's
        version and this package's code.
      num_processes: to spread the cases over. Compiling is what takes the time, and a compilation
        uses several threads by itself.

    Raises:
      errors.UserError: libtpu is missing, or a slice or a target does not exist.
    """
    topology.require_libtpu()
    for case in cases:
        topology.chip_of(case.slice_name)
    num_processes = max(1, min(num_processes, len(cases)))
    shares = [list(range(start, len(cases), num_processes)) for start in range(num_processes)]
    with futures.ThreadPoolExecutor(num_processes) as pool:
        found = pool.map(lambda share: _in_turn([cases[i] for i in share], cache_directory), shares)
        results = dict(
            (index, result)
            for share, some in zip(shares, found)
            for index, result in zip(share, some)
        )
    return [results[index] for index in range(len(cases))]


def kernel_costs(case: Case, *, cache_directory: str | None = None) -> list[KernelCost]:
    """Returns what the Pallas kernels of one program cost.

    Raises:
      errors.UserError: as `costs`, and if the program is not compiled, with the reason.
    """
    (result,) = costs([case], cache_directory=cache_directory)
    if isinstance(result, Refusal):
        raise errors.UserError(f"{case.target} for {case.slice_name}: {result.reason}")
    return list(result.kernels)


def _in_turn(cases: Sequence[Case], cache_directory: str | None) -> list[ProgramCost | Refusal]:
    """Costs cases in one process after the other; a case that ends its process is refused."""
    results = []
    while len(results) < len(cases):
        answers, failure = _run_worker(cases[len(results) :], cache_directory)
        results += [
            _decode(case, answer) for case, answer in zip(cases[len(results) :], answers)
        ]
        if len(results) < len(cases):
            results.append(Refusal(cases[len(results)], "compilation", *failure))
    return results


def _run_worker(
    cases: Sequence[Case], cache_directory: str | None
) -> tuple[list[dict], tuple[str, str]]:
    """Returns the answers of a worker, and how it ended if they are too few."""
    with tempfile.TemporaryDirectory(prefix="llm_jax_aot_") as directory:
        work = pathlib.Path(directory)
        request = {
            "cases": [dataclasses.asdict(case) for case in cases],
            "cache_directory": cache_directory,
        }
        (work / "request.json").write_text(json.dumps(request))
        environment = os.environ | topology.ENVIRONMENT
        environment["JAX_PLATFORMS"] = "cpu"
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(
            [sys.executable, "-m", "llm_jax.aot.worker", directory],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        path = work / "answers.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
    answers = [json.loads(line) for line in lines]
    if answers and "mistake" in answers[-1]:
        raise errors.UserError(answers[-1]["mistake"])
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if not answers and done.returncode > 0:
        raise RuntimeError(f"the worker failed:\n{done.stderr}")
    return answers, (f"the compiler ended its process ({done.returncode}): {last}", done.stderr)


def _decode(case: Case, answer: dict) -> ProgramCost | Refusal:
    if "stage" in answer:
        return Refusal(case, **answer)
    operations = tuple(
        KernelCost(**{**fields, "guesses": tuple(fields["guesses"])})
        for fields in answer.pop("operations")
    )
    not_modelled = tuple(answer.pop("not_modelled"))
    return ProgramCost(case, **answer, operations=operations, not_modelled=not_modelled)
