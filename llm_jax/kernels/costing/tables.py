"""What the sections of the report share: Markdown tables, and results that may be refused."""

from collections.abc import Iterable
from collections.abc import Sequence

from llm_jax.aot import kernel_cost

Result = kernel_cost.ProgramCost | kernel_cost.Refusal


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns a Markdown table, line by line."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def chip_name(slice_name: str) -> str:
    """Returns "v5e" for "v5e:1x1"."""
    return slice_name.partition(":")[0]


def require_exact(cost: Result) -> None:
    """Raises RuntimeError for a program that was not compiled, or whose time is a guess."""
    if isinstance(cost, kernel_cost.Refusal):
        raise RuntimeError(f"{cost.case}: {cost.reason}")
    if not cost.is_exact:
        raise RuntimeError(f"{cost.case}: the modelled time is a guess")


_UNITS = ("valu", "eup", "xlu", "vector_load", "vector_store")


def busiest(operation: kernel_cost.KernelCost) -> str:
    """Returns how full the matrix unit is, and the fullest slot beside it, of one execution."""
    unit = max(_UNITS, key=lambda name: getattr(operation, name))
    words = {"vector_load": "VLD", "vector_store": "VST"}
    share = getattr(operation, unit)
    return f"MXU {operation.mxu:.0%}, {words.get(unit, unit.upper())} {share:.0%}"
