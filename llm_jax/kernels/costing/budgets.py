"""What each kernel may cost, committed: `python -m llm_jax.kernels.costing.budgets` rewrites the file.

A test of correctness does not see a kernel that has become twice as slow; a budget of modelled time,
VMEM and HBM traffic does. `tests/contracts` holds the kernels to them. Figures are those of one version
of the TPU compiler, and the file has a section for each version that somebody ran.
"""

from collections.abc import Mapping
import dataclasses
import importlib.metadata
import json
import pathlib

from llm_jax import command
from llm_jax import errors
from llm_jax.aot import kernel_cost
from llm_jax.kernels.costing import programs
from llm_jax.kernels.costing import shapes

PATH = pathlib.Path(__file__).parents[3] / "tests" / "contracts" / "kernel_budgets.json"
_SLICES = ("v5e:1x1", "v6e:1x1")
# What a figure may exceed its budget by: nothing here is noise, but compilers may order ties anew.
_TOLERANCES = {"milliseconds": 1.02, "hbm_bytes": 1.01, "vmem_bytes": 1.05}
# A figure this much below its budget makes the budget a bad guard.
_SLACK = 0.9


def _attention(**fields) -> tuple[str, dict]:
    shape = {"batch": 1, "length": 2048, "heads": 4, "has_gradient": True} | fields
    return programs.target("attention"), {"shape": dataclasses.asdict(shapes.Attention(**shape))}


def _decode(**fields) -> tuple[str, dict]:
    shape = {"lengths": (1000, 5000, 300, 4096), "key_heads": 4} | fields
    return programs.target("decode"), {"shape": dataclasses.asdict(shapes.Decode(**shape))}


def _cross_entropy(implementation: str) -> tuple[str, dict]:
    shape = shapes.CrossEntropy(2048, 8192, 512, implementation)
    return programs.target("cross_entropy"), {"shape": dataclasses.asdict(shape)}


PROGRAMS: Mapping[str, tuple[str, dict]] = {
    "attention forward": _attention(has_gradient=False),
    "attention": _attention(),
    "attention width 64": _attention(width=64),
    "attention of groups, soft-capped": _attention(key_heads=1, softcap=50.0),
    "attention window 512": _attention(mask="window 512"),
    "attention of documents of 512": _attention(mask="packed 512"),
    "attention ALiBi": _attention(bias="alibi"),
    "attention T5": _attention(bias="t5", has_bias_gradient=True),
    "decode, pages of 64": _decode(page=64),
    "decode, contiguous": _decode(page=None),
    "decode, int8": _decode(dtype="int8"),
    "cross-entropy, kernels": _cross_entropy("pallas"),
}


def cases() -> dict[str, kernel_cost.Case]:
    """Returns the program of each budget by its name."""
    return {
        f"{name}, {slice_name.partition(':')[0]}": kernel_cost.Case(target, slice_name, arguments)
        for name, (target, arguments) in PROGRAMS.items()
        for slice_name in _SLICES
    }


def compiler_version() -> str:
    """Returns which compiler the figures are of."""
    return f"libtpu {importlib.metadata.version('libtpu')}"


def figures(result: kernel_cost.ProgramCost | kernel_cost.Refusal) -> dict[str, float | str]:
    """Returns what is budgeted of a program, and the program's fingerprint: what is the same need not be compiled.

    Raises:
      errors.UserError: the program was not compiled, or its time is a guess.
    """
    if isinstance(result, kernel_cost.Refusal):
        raise errors.UserError(f"{result.case.arguments}: {result.reason}")
    if not result.is_exact:
        guesses = sorted({guess for one in result.operations for guess in one.guesses})
        raise errors.UserError(f"{result.case.arguments}: the time is a guess ({guesses})")
    return {
        "program": result.fingerprint,
        "milliseconds": round(result.seconds * 1e3, 5),
        "hbm_bytes": result.hbm_bytes_read + result.hbm_bytes_written,
        "vmem_bytes": max(kernel.vmem_bytes for kernel in result.kernels),
    }


def load(path: pathlib.Path = PATH) -> dict[str, dict[str, dict[str, float | str]]]:
    """Returns the figures by compiler version and name."""
    return json.loads(path.read_text()) if path.exists() else {}


def overruns(name: str, actual: Mapping[str, float], budget: Mapping[str, float]) -> list[str]:
    """Returns a line for each figure that is not within its budget."""
    found = []
    for figure, tolerance in _TOLERANCES.items():
        ratio = actual[figure] / budget[figure]
        if ratio > tolerance:
            found.append(f"{name}: {figure} {actual[figure]} is {ratio:.3f} of {budget[figure]}")
        if ratio < _SLACK:
            found.append(
                f"{name}: {figure} {actual[figure]} is {ratio:.3f} of {budget[figure]}: better; run"
                " python -m llm_jax.kernels.costing.budgets, and commit the file"
            )
    return found


def main() -> None:
    wanted = cases()
    results = kernel_cost.costs(list(wanted.values()))
    found = {name: figures(result) for name, result in zip(wanted, results, strict=True)}
    budgets = load() | {compiler_version(): found}
    PATH.write_text(json.dumps(budgets, indent=2, sort_keys=True) + "\n")
    for name, of_program in found.items():
        print(f"{name}: {of_program['milliseconds']:.4f} ms")
    print(f"written: {PATH}")


if __name__ == "__main__":
    command.run(main, lambda: None)
