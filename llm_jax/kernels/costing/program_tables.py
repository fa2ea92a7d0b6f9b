"""The report's tables of decoding, losses and whole training steps."""

import dataclasses
import pathlib
import runpy

import numpy as np

from llm_jax import config as config_lib
from llm_jax import mesh as mesh_lib
from llm_jax.aot import kernel_cost
from llm_jax.aot import steps
from llm_jax.aot import topology
from llm_jax.kernels.costing import of_configs
from llm_jax.kernels.costing import peers
from llm_jax.kernels.costing import programs
from llm_jax.kernels.costing import shapes
from llm_jax.kernels.costing import tables

_RACED = ("v5e:1x1", "v6e:1x1")

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

# Configs, with the slices that they name: what a step costs by the attention that it takes.
_STEPS = ("gpt2_124m", "llama_7b")
_ATTENTIONS = ("chunked", "pallas")


def decode_rows(cache: str | None, processes: int) -> list[str]:
    """The decode kernel against the bytes that it must read, and JAX's ragged paged attention."""
    targets = programs.target("decode"), f"{peers.__name__}:decode"
    places = [
        (name, slice_name, target)
        for name in _DECODES
        for slice_name in _RACED
        for target in targets
    ]
    cases = [
        kernel_cost.Case(target, slice_name, {"shape": dataclasses.asdict(_DECODES[name])})
        for name, slice_name, target in places
    ]
    costs = kernel_cost.costs(cases, cache_directory=cache, num_processes=processes)
    found = dict(zip(places, costs, strict=True))
    rows, header = [], ["cache"]
    for name, shape in _DECODES.items():
        cells = [name]
        for slice_name in _RACED:
            mine, other = (found[name, slice_name, target] for target in targets)
            cells += _decode_cells(mine, other, shape)
        rows.append(cells)
    for slice_name in _RACED:
        chip = tables.chip_name(slice_name)
        header += [f"{chip}: ms", "bytes / least", "time / roof", "ragged paged, / roof"]
    return [
        f"One query a row, {len(_MIXED)} rows of 1,024 to 8,192 slots, 8 key heads of width 128, 4 query"
        " heads each, bfloat16, pages of 128, but for what a row says. Least: keys and values that some"
        " query sees, once. Roof: that at 93% of the HBM's bandwidth. Beside it JAX's"
        " `ragged_paged_attention`.",
        "",
        *tables.table(header, rows),
    ]


def _decode_cells(mine: tables.Result, other: tables.Result, shape: shapes.Decode) -> list[str]:
    tables.require_exact(mine)
    (kernel,) = mine.kernels
    roof = shape.least_bytes / (0.93 * topology.chip_of(mine.case.slice_name).hbm_bandwidth)
    theirs = "not taken"
    if isinstance(other, kernel_cost.ProgramCost):
        seconds = sum(one.seconds for one in other.kernels)
        theirs = f"{seconds / roof:.2f}" if other.is_exact else "not known"
    return [
        f"{kernel.seconds * 1e3:.3f}",
        f"{kernel.hbm_bytes_read / shape.least_bytes:.3f}",
        f"{kernel.seconds / roof:.3f}",
        theirs,
    ]


def loss_rows(cache: str | None, processes: int) -> list[str]:
    """The three cross-entropies, forward and backward."""
    places = [
        (slice_name, size, name) for size in _LOSSES for slice_name in _RACED for name in _SCORERS
    ]
    cases = [
        kernel_cost.Case(
            programs.target("cross_entropy"),
            slice_name,
            {"shape": dataclasses.asdict(shapes.CrossEntropy(*size, name))},
        )
        for slice_name, size, name in places
    ]
    costs = kernel_cost.costs(cases, cache_directory=cache, num_processes=processes)
    found = dict(zip(places, costs, strict=True))
    rows = []
    for size in _LOSSES:
        for slice_name in _RACED:
            cells = [tables.chip_name(slice_name), " x ".join(f"{number:,}" for number in size)]
            for name in _SCORERS:
                cells += _loss_cells(found[slice_name, size, name])
            rows.append(cells)
    header = ["chip", "tokens x vocabulary x width"]
    for name in _SCORERS:
        header += [f"{name}: ms", "GiB"]
    return [
        "Loss and both gradients of a bfloat16 state and a float32 head, one device; GiB of HBM at the"
        " most, arguments and results included.",
        "",
        *tables.table(header, rows),
    ]


def _loss_cells(cost: tables.Result) -> list[str]:
    if isinstance(cost, kernel_cost.Refusal):
        return [f"does not compile: {cost.reason}", ""]
    guess = "" if cost.is_exact else " (a guess)"
    return [f"{cost.seconds * 1e3:.2f}{guess}", f"{cost.hbm_peak_bytes / 2**30:.2f}"]


def step_rows(cache: str | None, processes: int) -> list[str]:
    """A whole update of shipped configs on their slices, by attention."""
    configs = {name: _config(name) for name in _STEPS}
    cases = {
        (name, attention): _step(config, attention)
        for name, config in configs.items()
        for attention in _ATTENTIONS
    }
    cases |= {(name, "alone"): _attention(config) for name, config in configs.items()}
    costs = kernel_cost.costs(
        list(cases.values()),
        cache_directory=cache,
        num_processes=processes,
        timeout_seconds=3600.0,
    )
    found = dict(zip(cases, costs, strict=True))
    for name, cost in found.items():
        if isinstance(cost, kernel_cost.Refusal):
            raise RuntimeError(f"{name}: {cost.reason}")
    rows = []
    for name in _STEPS:
        plain, step, alone = (found[name, which] for which in (*_ATTENTIONS, "alone"))
        tables.require_exact(alone)
        in_kernels, guessed = of_configs.kernel_seconds(step, alone)
        seconds = step.seconds - step.exposed_seconds - guessed + in_kernels
        without = plain.seconds - plain.exposed_seconds
        rows.append(
            (
                f"`{name}`",
                step.case.slice_name,
                f"{without * 1e3:,.0f}",
                f"{seconds * 1e3:,.0f}",
                f"{seconds / without:.2f}",
                f"{in_kernels / seconds:.0%}",
                f"{plain.hbm_peak_bytes / 2**30:.2f}",
                f"{step.hbm_peak_bytes / 2**30:.2f}",
            )
        )
    header = ("config", "slice", "chunked: ms", "kernels: ms", "ratio", "in kernels")
    return [
        "One update of a whole batch, each config as it is shipped, on each chip of its slice; the"
        " time spent waiting for collectives is left out of both. `chunked` is attention in plain XLA,"
        " `model.attention=chunked`; the kernels are what a TPU takes unasked. Where documents begin is"
        " data, so the time of the kernels is taken from a program of theirs alone in which each row is"
        " one document, the most that they can have to do.",
        "",
        *tables.table((*header, "chunked: GiB", "kernels: GiB"), rows),
    ]


def _config(name: str) -> config_lib.RunConfig:
    path = pathlib.Path(__file__).parents[3] / "configs" / f"{name}.py"
    return config_lib.from_config_dict(runpy.run_path(str(path))["get_config"]())


def _step(config: config_lib.RunConfig, attention: str) -> kernel_cost.Case:
    model = dataclasses.replace(config.model, attention=attention)
    arguments = {"config": config_lib.to_dict(dataclasses.replace(config, model=model))}
    return kernel_cost.Case(f"{steps.__name__}:train_step", config.slice, arguments)


def _attention(config: config_lib.RunConfig) -> kernel_cost.Case:
    mesh = mesh_lib.make_abstract(config.mesh, topology.parse(config.slice).num_chips)
    return of_configs.attention(config, config.slice, dict(mesh.shape))
