"""The trust report of the kernels: `python -m llm_jax.kernels.costing.report` writes it.

Errors come from running the kernels, interpreted; times from the TPU compiler's schedule
(`llm_jax.aot`). Hours on two cores; with `--cache` what is done already is not done again.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import datetime
import importlib.metadata
import pathlib
import platform

from absl import flags
import jax
import numpy as np

from llm_jax import command
from llm_jax.aot import kernel_cost
from llm_jax.aot import topology
from llm_jax.kernels.costing import accuracy
from llm_jax.kernels.costing import peers
from llm_jax.kernels.costing import programs
from llm_jax.kernels.costing import shapes

PATH = pathlib.Path(__file__).parents[1] / "README.md"
_RACED = ("v5e:1x1", "v6e:1x1")
_COMPILED = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1")

# Causal, bfloat16, 16 heads: a chip's worth of rows at each length.
_RACES = tuple(
    shapes.Attention(batch, length, width=width, has_gradient=has_gradient)
    for width in (128, 64)
    for batch, length in ((8, 2048), (4, 4096), (4, 8192), (1, 32768))
    for has_gradient in (False, True)
)

_BASE = shapes.Attention(4, 4096, has_gradient=True)
# What is compared with the causal row of its length, and compiled for every generation.
_FEATURES = {
    "causal": _BASE,
    "full": dataclasses.replace(_BASE, mask="full"),
    "packed documents of 512": dataclasses.replace(_BASE, mask="packed 512"),
    "4 key heads of 16": dataclasses.replace(_BASE, key_heads=4),
    "soft-cap": dataclasses.replace(_BASE, softcap=50.0),
    "sinks": dataclasses.replace(_BASE, has_sinks=True),
    "ALiBi": dataclasses.replace(_BASE, bias="alibi"),
    "T5 bias": dataclasses.replace(_BASE, bias="t5"),
    "T5 bias, gradient to the table": dataclasses.replace(_BASE, bias="t5", has_bias_gradient=True),
    "bias array": dataclasses.replace(_BASE, bias="array"),
    "bias array, its gradient": dataclasses.replace(_BASE, bias="array", has_bias_gradient=True),
    "width 80": dataclasses.replace(_BASE, width=80),
    "width 96": dataclasses.replace(_BASE, width=96),
    "width 192, values 128": dataclasses.replace(_BASE, width=192, value_width=128),
    "width 256": dataclasses.replace(_BASE, width=256),
    "length 4,000": dataclasses.replace(_BASE, length=4000),
    "float32": dataclasses.replace(_BASE, dtype="float32"),
    "causal, 32,768": dataclasses.replace(_BASE, batch=1, length=32768),
    "window 1,024 of 32,768": dataclasses.replace(_BASE, batch=1, length=32768, mask="window 1024"),
}

_ACCURACY = {
    "causal": shapes.Attention(1, accuracy.LENGTH, heads=2),
    "causal, width 64": shapes.Attention(1, accuracy.LENGTH, heads=2, width=64),
    "groups, soft-cap, sinks": shapes.Attention(
        1, accuracy.LENGTH, heads=4, key_heads=2, softcap=20.0, has_sinks=True
    ),
    "ALiBi": shapes.Attention(1, accuracy.LENGTH, heads=2, bias="alibi"),
    "T5 bias": shapes.Attention(1, accuracy.LENGTH, heads=2, mask="full", bias="t5"),
    "window 200": shapes.Attention(1, accuracy.LENGTH, heads=2, mask="window 200"),
    "packed documents of 100": shapes.Attention(1, accuracy.LENGTH, heads=2, mask="packed 100"),
}

_MIXED = tuple(int(x) for x in np.random.default_rng(0).integers(1024, 8193, 32))
_DECODES = {
    "pages of 16": shapes.Decode(_MIXED, page=16),
    "pages of 128": shapes.Decode(_MIXED),
    "contiguous": shapes.Decode(_MIXED, page=None),
    "8 rows of 32,768": shapes.Decode((32768,) * 8),
    "16 key heads, no groups": shapes.Decode(_MIXED, key_heads=16, group=1),
    "width 64": shapes.Decode(_MIXED, width=64),
    "window 1,024, pages of 16": shapes.Decode(_MIXED, page=16, window=1024),
    "4 queries a row": shapes.Decode(_MIXED, queries=4),
    "int8": shapes.Decode(_MIXED, dtype="int8"),
}

# Tokens, vocabulary and width of GPT-2, Llama 1B and Llama 7B.
_LOSSES = ((8192, 50304, 768), (8192, 128256, 2048), (8192, 32000, 4096))
_SCORERS = ("reference", "chunked", "pallas")

Result = kernel_cost.ProgramCost | kernel_cost.Refusal


def define_flags() -> None:
    flags.DEFINE_string("cache", None, "Folder that keeps what each program costs.")
    flags.DEFINE_integer("processes", 1, "Compilations side by side.", lower_bound=1)


def main() -> None:
    topology.require_libtpu()
    cache, processes = flags.FLAGS.cache, flags.FLAGS.processes
    sections = [
        _introduction(),
        _section("Errors", _accuracy_rows()),
        _section("Beside other kernels", _race_rows(cache, processes)),
        _section("What attention costs by what it does", _feature_rows(cache, processes)),
        _section("Decoding", _decode_rows(cache, processes)),
        _section("Cross-entropy", _loss_rows(cache, processes)),
    ]
    PATH.write_text("\n\n".join(sections) + "\n")
    print(f"written: {PATH}")


def ours(shape: shapes.Attention, slice_name: str) -> kernel_cost.Case:
    """Returns the program of this repository's kernels."""
    arguments = {"shape": dataclasses.asdict(shape)}
    return kernel_cost.Case(programs.target("attention"), slice_name, arguments)


def _introduction() -> str:
    versions = [f"jax {jax.__version__}"]
    for name in ("libtpu", "tokamax"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    return "\n".join(
        [
            "# Kernels: what they get wrong and what they cost",
            "",
            f"Written by `python -m llm_jax.kernels.costing.report` on {datetime.date.today()}:"
            f" {', '.join(versions)}; {platform.machine()}, no TPU.",
            "",
            "**Nothing here was measured on a TPU.** Times are modelled: the TPU compiler's own"
            " schedule, executed by `llm_jax.aot`, which says how and how well. Ratios of programs"
            " for one chip are what to trust.",
        ]
    )


def _section(title: str, rows: Iterable[str]) -> str:
    return "\n".join([f"## {title}", "", *rows])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns a Markdown table, line by line."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _accuracy_rows() -> list[str]:
    rows = []
    for name, shape in _ACCURACY.items():
        for dtype in ("float32", "bfloat16"):
            typed = dataclasses.replace(shape, dtype=dtype)
            found = {"ours, v5e": accuracy.of_ours(typed, "TPU v5 lite")}
            found["ours, v6e"] = accuracy.of_ours(typed, "TPU v6 lite")
            for setting in peers.small_settings(typed):
                found[str(setting.peer)] = accuracy.of_peer(setting, typed)
            rows += [
                (name, dtype, kernel, f"{errors.result:.1e}", f"{errors.gradient:.1e}")
                for kernel, errors in found.items()
            ]
            print(f"errors: {name}, {dtype}", flush=True)
    return [
        f"Largest error over largest value, against float64; {accuracy.LENGTH:,} queries and keys, unit"
        " normal, kernels interpreted on a CPU (which multiplies float32 exactly for all of them), with"
        " the blocks of the chip.",
        "",
        *table(("attention", "dtype", "kernel", "result", "worst gradient"), rows),
    ]


def _race_rows(cache: str | None, processes: int) -> list[str]:
    """Our kernels beside the best setting of the peers, shape by shape."""
    rows = []
    for slice_name in _RACED:
        for shape in _RACES:
            settings = peers.settings(shape)
            cases = [ours(shape, slice_name)]
            cases += [peers.case(setting, shape, slice_name) for setting in settings]
            mine, *others = kernel_cost.costs(cases, cache_directory=cache, num_processes=processes)
            _require_exact(mine)
            times = _seconds(dict(zip(settings, others, strict=True)))
            best = min(times, key=times.get, default=None)
            beside = ("none compiles", "")
            if best is not None:
                ratio = mine.seconds / times[best]
                beside = f"{times[best] * 1e3:.2f} ({best})", f"{ratio:.2f}"
            rows.append(
                (
                    slice_name.partition(":")[0],
                    f"{shape.width}",
                    f"{shape.batch} x {shape.length:,}",
                    "forward + backward" if shape.has_gradient else "forward",
                    *_figures(mine, shape),
                    *beside,
                )
            )
            print(f"race: {slice_name} {shape.width} {shape.length}: {rows[-1][-1]}", flush=True)
    header = ("chip", "width", "batch x length", "pass", *_FIGURES, "best peer, ms", "ratio")
    return [
        "Causal, bfloat16, 16 heads. The peers: JAX's flash and splash attention and tokamax's splash"
        " attention, each in several block sizes at 96 MiB of VMEM, the fastest one shown.",
        "",
        *table(header, rows),
    ]


def _seconds(found: dict[peers.Setting, Result]) -> dict[peers.Setting, float]:
    """Returns the times that are known; says which are not, and why."""
    times = {}
    for setting, cost in found.items():
        if isinstance(cost, kernel_cost.Refusal):
            print(f"left out: {setting}: {cost.reason}", flush=True)
        elif not cost.is_exact:
            print(f"left out: {setting}: its time is a guess", flush=True)
        else:
            times[setting] = cost.seconds
    return times


_FIGURES = ("ms", "MXU", "FLOPs/s", "HBM / least", "VMEM MiB")


def _figures(cost: kernel_cost.ProgramCost, shape: shapes.Attention) -> tuple[str, ...]:
    """Time, share of the matrix units' time, of the chip's peak, traffic, and VMEM."""
    chip = topology.chip_of(cost.case.slice_name)
    moved = (cost.hbm_bytes_read + cost.hbm_bytes_written) / shape.least_bytes
    vmem = max(kernel.vmem_bytes for kernel in cost.kernels)
    return (
        f"{cost.seconds * 1e3:.2f}",
        f"{cost.mxu:.0%}",
        f"{shape.flops / cost.seconds / chip.peak_bf16_flops:.0%}",
        f"{moved:.2f}",
        f"{vmem / 2**20:.0f}",
    )


def _require_exact(cost: Result) -> None:
    if isinstance(cost, kernel_cost.Refusal):
        raise RuntimeError(f"{cost.case}: {cost.reason}")
    if not cost.is_exact:
        raise RuntimeError(f"{cost.case}: the modelled time is a guess")


def _feature_rows(cache: str | None, processes: int) -> list[str]:
    names = [(name, slice_name) for name in _FEATURES for slice_name in _COMPILED]
    cases = [ours(_FEATURES[name], slice_name) for name, slice_name in names]
    costs = kernel_cost.costs(cases, cache_directory=cache, num_processes=processes)
    found = dict(zip(names, costs, strict=True))
    rows = []
    for name, shape in _FEATURES.items():
        cells = [name]
        for slice_name in _COMPILED:
            cells += _feature_cells(found, name, slice_name, shape)
        rows.append(cells)
    header = ["attention"]
    for slice_name in _COMPILED:
        chip = slice_name.partition(":")[0]
        header += [f"{chip}: ms", "/ causal", "HBM / least", "VMEM MiB"]
    return [
        "Forward and backward; 4 x 4,096 tokens, bfloat16, 16 heads of width 128 and causal but for"
        " what a row says. `/ causal` is time over that of the causal row of the same length, for pairs"
        " that attend: 1 where time is in proportion.",
        "",
        *table(header, rows),
    ]


def _decode_rows(cache: str | None, processes: int) -> list[str]:
    """The decode kernel against the bytes that it must read, and JAX's ragged paged attention."""
    rows = []
    for name, shape in _DECODES.items():
        cells = [name]
        arguments = {"shape": dataclasses.asdict(shape)}
        for slice_name in _RACED:
            cases = [
                kernel_cost.Case(target, slice_name, arguments)
                for target in (programs.target("decode"), f"{peers.__name__}:decode")
            ]
            mine, other = kernel_cost.costs(cases, cache_directory=cache, num_processes=processes)
            cells += _decode_cells(mine, other, shape)
        rows.append(cells)
        print(f"decode: {name}: {cells[1:]}", flush=True)
    header = ["cache"]
    for slice_name in _RACED:
        chip = slice_name.partition(":")[0]
        header += [f"{chip}: ms", "bytes / least", "time / roof", "ragged paged, / roof"]
    return [
        f"One query a row, {len(_MIXED)} rows of 1,024 to 8,192 slots, 8 key heads of width 128, 4 query"
        " heads each, bfloat16, pages of 128, but for what a row says. Least: keys and values that some"
        " query sees, once. Roof: that at 93% of the HBM's bandwidth. Beside it JAX's"
        " `ragged_paged_attention`.",
        "",
        *table(header, rows),
    ]


def _decode_cells(mine: Result, other: Result, shape: shapes.Decode) -> list[str]:
    _require_exact(mine)
    (kernel,) = mine.kernels
    roof = shape.least_bytes / (0.93 * topology.chip_of(mine.case.slice_name).hbm_bandwidth)
    theirs = "not taken"
    if isinstance(other, kernel_cost.ProgramCost):
        seconds = sum(one.seconds for one in other.kernels)
        theirs = f"{seconds / roof:.2f}" + ("" if other.is_exact else " (a guess)")
    return [
        f"{kernel.seconds * 1e3:.3f}",
        f"{kernel.hbm_bytes_read / shape.least_bytes:.3f}",
        f"{kernel.seconds / roof:.3f}",
        theirs,
    ]


def _loss_rows(cache: str | None, processes: int) -> list[str]:
    """The three cross-entropies, forward and backward."""
    rows = []
    for tokens, ids, width in _LOSSES:
        for slice_name in _RACED:
            cases = []
            for name in _SCORERS:
                shape = dataclasses.asdict(shapes.CrossEntropy(tokens, ids, width, name))
                target = programs.target("cross_entropy")
                cases.append(kernel_cost.Case(target, slice_name, {"shape": shape}))
            found = kernel_cost.costs(cases, cache_directory=cache, num_processes=processes)
            cells = [slice_name.partition(":")[0], f"{tokens:,} x {ids:,} x {width:,}"]
            for cost in found:
                if isinstance(cost, kernel_cost.Refusal):
                    cells += [f"does not compile: {cost.reason}", ""]
                    continue
                guess = "" if cost.is_exact else " (a guess)"
                cells += [f"{cost.seconds * 1e3:.2f}{guess}", f"{cost.hbm_peak_bytes / 2**30:.2f}"]
            rows.append(cells)
            print(f"cross-entropy: {cells}", flush=True)
    header = ["chip", "tokens x vocabulary x width"]
    for name in _SCORERS:
        header += [f"{name}: ms", "GiB"]
    return [
        "Loss and both gradients of a bfloat16 state and a float32 head, one device; GiB of HBM at the"
        " most, arguments and results included.",
        "",
        *table(header, rows),
    ]


def _feature_cells(found: dict, name: str, slice_name: str, shape: shapes.Attention) -> list[str]:
    cost = found[name, slice_name]
    if isinstance(cost, kernel_cost.Refusal):
        return [f"does not compile: {cost.reason}", "", "", ""]
    base = "causal, 32,768" if shape.length == 32768 else "causal"
    causal = found[base, slice_name]
    relative = cost.seconds / shape.flops / (causal.seconds / _FEATURES[base].flops)
    ms, _, _, moved, vmem = _figures(cost, shape)
    return [ms if cost.is_exact else f"{ms} (a guess)", f"{relative:.2f}", moved, vmem]


if __name__ == "__main__":
    command.run(main, define_flags)
