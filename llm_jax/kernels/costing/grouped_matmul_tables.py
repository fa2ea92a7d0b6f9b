"""The grouped matrix product beside others: `python -m llm_jax.kernels.costing.grouped_matmul_tables`.

Writes `grouped_matmul/README.md`. An hour on two cores; with `--cache` what is done already is not done
again.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import datetime
import importlib.metadata
import pathlib
import platform

from absl import flags

from llm_jax import command
from llm_jax import errors
from llm_jax.aot import kernel_cost
from llm_jax.aot import machine
from llm_jax.aot import topology
from llm_jax.kernels.costing import grouped_matmul_peers as peers
from llm_jax.kernels.costing import programs
from llm_jax.kernels.costing import shapes
from llm_jax.kernels.costing import tables

PATH = pathlib.Path(__file__).parents[1] / "grouped_matmul" / "README.md"

_COMMAND = "python -m llm_jax.kernels.costing.grouped_matmul_tables"
_SLICES = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1")
# Rows, depth, width and groups of a device.
_LAYERS = {
    "OLMoE": (32768, 2048, 1024, 64),
    "OLMoE 8 of 64": (32768, 2048, 1024, 8),
    "Qwen3-30B-A3B": (32768, 2048, 768, 128),
    "DeepSeek-MoE 16B": (24576, 2048, 1408, 64),
    "Mixtral 8x7B": (8192, 4096, 14336, 8),
}
_LOADS = ("balanced", "ragged")
_PASSES = ("product", "rows", "matrices")
_TIMEOUT_SECONDS = 300.0

Place = tuple[str, str, str, str]  # slice, layer, load, pass


def define_flags() -> None:
    flags.DEFINE_string("cache", None, "Folder that keeps what each program costs.")
    flags.DEFINE_integer("processes", 1, "Compilations side by side.", lower_bound=1)
    flags.DEFINE_list("slices", ",".join(_SLICES), "Single chips to compile for.")
    flags.DEFINE_list("layers", ",".join(_LAYERS), "Which layers.")


def main() -> None:
    topology.require_libtpu()
    layers = flags.FLAGS.layers
    unknown = [layer for layer in layers if layer not in _LAYERS]
    if unknown:
        raise errors.UserError(f"--layers: {unknown[0]!r} is none of {', '.join(_LAYERS)}")
    given = flags.FLAGS.cache, flags.FLAGS.processes
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu")]
    lines = [
        "# Products of grouped rows: what they cost",
        "",
        f"Written by `{_COMMAND}` on {datetime.date.today()}: {', '.join(versions)};"
        f" {platform.machine()}, no TPU.",
        "",
        *race_rows(flags.FLAGS.slices, layers, *given),
        "",
        *tables_rows(flags.FLAGS.slices, *given),
    ]
    PATH.write_text("\n".join(lines) + "\n")
    print(f"written: {PATH}")


def _shape(place: Place) -> shapes.GroupedMatmul:
    _, layer, load, of = place
    return shapes.GroupedMatmul(*_LAYERS[layer], load, of)


def race_rows(
    slices: Sequence[str], layers: Sequence[str], cache: str | None, processes: int
) -> list[str]:
    """Our kernels beside the best settings of the peers, shape by shape."""
    places = [
        (slice_name, layer, load, of)
        for slice_name in slices
        for layer in layers
        for load in _LOADS
        for of in _PASSES
    ]
    cases, owners = [], []
    for place in places:
        shape = _shape(place)
        arguments = {"shape": dataclasses.asdict(shape)}
        cases.append(kernel_cost.Case(programs.target("grouped_matmul"), place[0], arguments))
        owners.append((place, None))
        for setting in peers.settings(shape, place[0]):
            cases.append(peers.case(setting, shape, place[0]))
            owners.append((place, setting))
    how = {"num_processes": processes, "timeout_seconds": _TIMEOUT_SECONDS}
    costs = kernel_cost.costs(cases, cache_directory=cache, **how)
    found: dict[Place, dict] = {place: {} for place in places}
    for (place, setting), cost in zip(owners, costs, strict=True):
        found[place][setting] = cost
    header = ("chip", "layer", "load", "of", "ms", "of peak", "of roof")
    header += ("ragged_dot as it is", "ragged_dot", "megablox", "/ best")
    return [
        "Modelled times of one product in bfloat16: the TPU compiler's schedule, executed by"
        " `llm_jax.aot`; ratios of programs for one chip are what to trust. `of`: the product, its"
        " gradient of rows, or of matrices. Peak: the matrix units'; roof: the larger of that and of"
        " reading and writing every array once at 93% of the HBM's bandwidth. Loads: groups of equal"
        " rows, or shares drawn from a gamma distribution of shape 2. The peers: XLA's `ragged_dot` with its own"
        " tiling and with the best of some given to it (`ragged_dot_tiling`), JAX's megablox with the best"
        " of the same. `/ best`: our time over the fastest peer's. Rows after the last group, of which"
        " there are none here, the peers leave as they find them.",
        "",
        *tables.table(header, [_cells(place, found[place]) for place in places]),
    ]


def _cells(place: Place, found: Mapping[peers.Setting | None, tables.Result]) -> list[str]:
    mine, shape = found[None], _shape(place)
    tables.require_exact(mine)
    chip = topology.chip_of(place[0])
    peak = shape.flops / chip.peak_bf16_flops
    roof = max(peak, shape.least_bytes / (machine.HBM_EFFICIENCY * chip.hbm_bandwidth))
    seconds = {}
    for setting, cost in found.items():
        if setting is None:
            continue
        if isinstance(cost, kernel_cost.Refusal):
            print(f"left out: {place}, {setting}: {cost.reason}", flush=True)
        elif not cost.is_exact:
            print(f"left out: {place}, {setting}: its time is a guess", flush=True)
        else:
            seconds[setting] = cost.seconds

    def best(peer):
        own = {setting: time for setting, time in seconds.items() if setting.peer == peer}
        if not own:
            return "not known"
        setting = min(own, key=own.get)
        sizes = "/".join(map(str, setting.tiling)) if setting.tiling else "as it is"
        return f"{own[setting] * 1e3:.3f} ({sizes})"

    plain = seconds.get(peers.Setting("ragged_dot", None))
    return [
        tables.chip_name(place[0]),
        *place[1:],
        f"{mine.seconds * 1e3:.3f}",
        f"{peak / mine.seconds:.0%}",
        f"{roof / mine.seconds:.0%}",
        "not known" if plain is None else f"{plain * 1e3:.3f}",
        best("ragged_dot"),
        best("megablox"),
        f"{mine.seconds / min(seconds.values()):.2f}" if seconds else "",
    ]


def tables_rows(slices: Sequence[str], cache: str | None, processes: int) -> list[str]:
    """What the tables cost that kernels are told by which rows are whose."""
    targets = {
        "ours": programs.target("grouped_matmul_tables"),
        "megablox": f"{peers.__name__}:tables",
    }
    shape = shapes.GroupedMatmul(*_LAYERS["OLMoE"], "ragged", "product")
    arguments = {"shape": dataclasses.asdict(shape)}
    cases = [
        kernel_cost.Case(target, slice_name, arguments)
        for slice_name in slices
        for target in targets.values()
    ]
    costs = iter(kernel_cost.costs(cases, cache_directory=cache, num_processes=processes))
    rows = []
    for slice_name in slices:
        cells = [tables.chip_name(slice_name)]
        for _, cost in zip(targets, costs):
            if isinstance(cost, kernel_cost.Refusal):
                raise RuntimeError(f"{cost.case}: {cost.reason}")
            cells.append(f"{cost.seconds * 1e6:.1f}")
        rows.append(cells)
    return [
        "Microseconds to make the tables from the sizes of groups (OLMoE's), which the times above do"
        " without where the peer is not `ragged_dot`. Products and gradients of rows of a layer share"
        " them.",
        "",
        *tables.table(("chip", *targets), rows),
    ]


if __name__ == "__main__":
    command.run(main, define_flags)
