"""The report's tables of attention: errors, races with other kernels, and what each option costs."""

import dataclasses

from llm_jax.aot import kernel_cost
from llm_jax.aot import topology
from llm_jax.kernels.costing import accuracy
from llm_jax.kernels.costing import peers
from llm_jax.kernels.costing import programs
from llm_jax.kernels.costing import shapes
from llm_jax.kernels.costing import tables

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


def ours(shape: shapes.Attention, slice_name: str) -> kernel_cost.Case:
    """Returns the program of this repository's kernels."""
    arguments = {"shape": dataclasses.asdict(shape)}
    return kernel_cost.Case(programs.target("attention"), slice_name, arguments)


def accuracy_rows() -> list[str]:
    """The largest errors of our kernels and the peers', by running them interpreted."""
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
        *tables.table(("attention", "dtype", "kernel", "result", "worst gradient"), rows),
    ]


def race_rows(cache: str | None, processes: int) -> list[str]:
    """Our kernels beside the best setting of the peers, shape by shape."""
    places = [(slice_name, shape) for slice_name in _RACED for shape in _RACES]
    cases, owners = [], []
    for place in places:
        slice_name, shape = place
        settings = peers.settings(shape)
        cases += [ours(shape, slice_name)]
        cases += [peers.case(setting, shape, slice_name) for setting in settings]
        owners += [(place, setting) for setting in (None, *settings)]
    costs = kernel_cost.costs(cases, cache_directory=cache, num_processes=processes)
    found = dict(zip(owners, costs, strict=True))
    rows = []
    for place in places:
        slice_name, shape = place
        mine = found[place, None]
        tables.require_exact(mine)
        times = _seconds({setting: found[place, setting] for setting in peers.settings(shape)})
        beside = ("none compiles", "")
        if times:
            best = min(times, key=times.get)
            ratio = mine.seconds / times[best]
            beside = f"{times[best] * 1e3:.2f} ({best})", f"{ratio:.2f}"
        rows.append(
            (
                tables.chip_name(slice_name),
                f"{shape.width}",
                f"{shape.batch} x {shape.length:,}",
                "forward + backward" if shape.has_gradient else "forward",
                *_figures(mine, shape),
                *beside,
            )
        )
    header = ("chip", "width", "batch x length", "pass", *_FIGURES, "best peer, ms", "ratio")
    return [
        "Causal, bfloat16, 16 heads. The peers: JAX's flash and splash attention and tokamax's splash"
        " attention, each in several block sizes at 96 MiB of VMEM, the fastest one shown.",
        "",
        *tables.table(header, rows),
    ]


def _seconds(found: dict[peers.Setting, tables.Result]) -> dict[peers.Setting, float]:
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


def feature_rows(cache: str | None, processes: int) -> list[str]:
    """What each mask, score, width and dtype costs, on every generation."""
    names = [(name, slice_name) for slice_name in _COMPILED for name in _FEATURES]
    cases = [ours(_FEATURES[name], slice_name) for name, slice_name in names]
    costs = kernel_cost.costs(cases, cache_directory=cache, num_processes=processes)
    found = dict(zip(names, costs, strict=True))
    rows = [
        (tables.chip_name(slice_name), name, *_feature_cells(found, name, slice_name))
        for name, slice_name in names
    ]
    header = ("chip", "attention", "ms", "/ causal", "forward kernel", "backward kernel")
    return [
        "Forward and backward; 4 x 4,096 tokens, bfloat16, 16 heads of width 128 and causal but for"
        " what a row says. `/ causal` is time over that of the causal row of the same length, both for"
        " a tile of 256 x 256 that holds a pair that attends, and for the width: 1 where time is in"
        " proportion. A kernel's time, its matrix unit's share and its fullest other slot (VALU"
        " arithmetic, EUP exponentials, XLU moves across lanes, VLD and VST loads and stores) say what"
        " holds a row up: where no slot is full it is what a head costs whatever it sees, the latency"
        " of short loops, and mask arithmetic (of packed documents every tile is masked, of a causal"
        " mask one in eight).",
        "",
        *tables.table((*header, "HBM / least", "VMEM MiB"), rows),
    ]


def _feature_cells(found: dict, name: str, slice_name: str) -> list[str]:
    cost, shape = found[name, slice_name], _FEATURES[name]
    if isinstance(cost, kernel_cost.Refusal):
        return [f"does not compile: {cost.reason}", *[""] * 5]
    base = "causal, 32,768" if shape.length == 32768 else "causal"
    causal = found[base, slice_name]
    relative = cost.seconds / _work(shape) / (causal.seconds / _work(_FEATURES[base]))
    ms, _, _, moved, vmem = _figures(cost, shape)
    kernels = [
        ", ".join(
            f"{one.seconds * 1e3:.2f} ms, {tables.busiest(one)}"
            for one in cost.kernels
            if f"flash_attention_{which}" in one.name
        )
        for which in ("forward", "backward")
    ]
    time = ms if cost.is_exact else f"{ms} (a guess)"
    return [time, f"{relative:.2f}", *kernels, moved, vmem]


def _work(shape: shapes.Attention) -> float:
    """Returns FLOPs as if the tiles of 256 x 256 that hold a pair that attends were full."""
    return shape.flops / shape.num_pairs * shape.num_tiles * 256**2
