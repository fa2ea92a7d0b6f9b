"""Plans as tables for a terminal."""

from collections.abc import Iterable
from collections.abc import Sequence
import importlib.metadata

from llm_jax.aot import kernel_cost
from llm_jax.plan import planner
from llm_jax.plan import refusals

_GIB = 1 << 30


def table(rows: Iterable[Sequence[str]], indent: str = "  ") -> list[str]:
    """Returns lines with aligned columns, the first to the left and the others to the right."""
    rows = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines


def versions() -> str:
    """Returns the versions of what the figures come from."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))


def gibibytes(num_bytes: int) -> str:
    """Returns "1.25"."""
    return f"{num_bytes / _GIB:.2f}"


def describe(plan: planner.Plan, name: str) -> list[str]:
    """Returns the lines on one plan."""
    sizes = " ".join(
        f"{axis}={size}" for axis, size in plan.mesh.shape.items() if size > 1 or axis == "data"
    )
    config = plan.config
    lines = [
        f"{name} on {plan.slice_name}: {plan.num_chips} x {plan.chip.name}, {sizes}, rules"
        f" {config.mesh.rules}, remat {config.model.remat}, batch {config.data.batch_size} x"
        f" {config.data.sequence_length} in {config.optim.accumulation_steps} part(s)",
    ]
    if not plan.is_compiled:
        return lines + _refused(plan)
    lines += ["", "HBM of a chip, GiB", *table(_memory(plan))]
    if plan.program.memory.host:
        lines += table([("memory of the host", gibibytes(plan.program.memory.host))])
    lines += ["", "Time of a step, modelled", *table(_time(plan))]
    lines += ["", *_collectives(plan.program)]
    return lines


def _refused(plan: planner.Plan) -> list[str]:
    told = refusals.explain(plan.program.details, plan.config, plan.estimate)
    if told is None:
        return [f"  does not compile ({plan.program.stage}): {plan.program.reason}"]
    return ["  does not fit: " + told[0], *("    " + line for line in told[1:])]


def _memory(plan: planner.Plan) -> list[tuple[str, str]]:
    memory = plan.program.memory
    others = memory.arguments - plan.estimate.parameters - plan.estimate.optimiser
    kept = [
        ("parameters", plan.estimate.parameters),
        ("optimiser", plan.estimate.optimiser),
        ("batch and counters", max(0, others)),
        ("activations, gradients, buffers", memory.temporaries),
        ("results that replace no argument", max(0, memory.results - memory.aliased)),
        ("program", memory.code),
        ("peak", memory.peak + memory.code),
        ("available", plan.chip.hbm_bytes),
        ("headroom", plan.headroom),
    ]
    return [(name, gibibytes(size)) for name, size in kept]


def _time(plan: planner.Plan) -> list[tuple[str, str, str]]:
    total, exposed = plan.seconds, plan.program.exposed_seconds
    parts = [
        ("attention kernels", plan.kernel_seconds),
        ("other operations", total - exposed - plan.kernel_seconds),
        ("waiting for other chips", exposed),
        ("step", total),
    ]
    rows = [(name, f"{seconds * 1e3:,.1f} ms", f"{seconds / total:.0%}") for name, seconds in parts]
    rate = plan.tokens / total
    return rows + [
        ("model FLOPs", f"{plan.flops:.3g}", ""),
        ("MFU", f"{plan.mfu:.1%}", ""),
        ("tokens a second", f"{rate:,.0f}", ""),
        ("tokens a second and chip", f"{rate / plan.num_chips:,.0f}", ""),
        ("compiled in, here", f"{plan.program.compile_seconds:,.0f} s", ""),
    ]


def _collectives(program: kernel_cost.ProgramCost) -> list[str]:
    if not program.collectives:
        return ["No collectives"]
    rows = [("Collectives of a chip", "axes", "times", "GiB", "links busy")]
    for cost in program.collectives:
        axes = ",".join(cost.axes) or "?"
        size = f"{cost.num_bytes / _GIB:,.3f}"
        times = f"{cost.num_executions:,}"
        rows.append((f"  {cost.kind}", axes, times, size, f"{cost.seconds * 1e3:,.1f} ms"))
    return table(rows, indent="")


def notes(plans: Sequence[planner.Plan]) -> list[str]:
    """Returns what is to be known of the figures."""
    lines = [
        f"Compiled by {versions()}; nothing was run. The time is modelled: each operation's bundles are"
        " executed, collectives are sent over the links of the slice (llm_jax/aot says how, and how far"
        " off that is: some 10 to 15% too fast for a whole step). Kernels count each row as one document.",
    ]
    missing = sorted({m for plan in plans if plan.is_compiled for m in plan.program.not_modelled})
    if missing:
        lines.append(f"Not modelled: {', '.join(missing)}.")
    return lines
