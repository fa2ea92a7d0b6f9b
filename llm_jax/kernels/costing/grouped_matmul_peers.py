"""Other grouped matrix products as programs for a TPU: XLA's `ragged_dot` and JAX's megablox."""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import importlib

import jax
from jax.experimental import xla_metadata
import jax.numpy as jnp
import numpy as np

from llm_jax.aot import kernel_cost
from llm_jax.aot import topology
from llm_jax.kernels.costing import shapes

# The package has a function of the same name.
megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")

_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to run a peer.

    Attributes:
      peer: "ragged_dot" or "megablox".
      tiling: rows, contracted and other dimension of a block (of a matrix' gradient: rows, its two
        dimensions); None for XLA's own choice.
    """

    peer: str
    tiling: tuple[int, int, int] | None

    def __str__(self) -> str:
        return f"{self.peer} {'/'.join(map(str, self.tiling or ('as it is',)))}"


def settings(shape: shapes.GroupedMatmul, slice_name: str) -> list[Setting]:
    """Returns the settings worth a compilation, in blocks as large as VMEM lets them be."""
    chip = topology.chip_of(slice_name)
    inner = shape.width if shape.of == "rows" else shape.depth
    # Long contracted dimensions whole, or cut, with more rows for each time that matrices are fetched.
    wanted = [(512, inner), (256, inner), (128, inner)]
    if inner > 2048:
        wanted = [(512, inner), (256, inner), (1024, 2048), (512, 2048)]
    tilings = [
        _tiling(shape, rows, most, chip.num_cores, _vmem(slice_name)) for rows, most in wanted
    ]
    tilings = list(dict.fromkeys(filter(None, tilings)))
    found = [Setting(peer, tiling) for peer in ("ragged_dot", "megablox") for tiling in tilings]
    return [Setting("ragged_dot", None), *found]


def _vmem(slice_name: str) -> int:
    """Returns the bytes of VMEM that kernels are given; XLA keeps some."""
    return topology.chip_of(slice_name).vmem_bytes * 3 // 4


def _tiling(
    shape: shapes.GroupedMatmul, rows: int, most: int, cores: int, vmem: int
) -> tuple[int, int, int] | None:
    inner, outer = shape.depth, shape.width
    if shape.of == "rows":
        inner, outer = outer, inner

    def size(tiling):
        """Two buffers of each block, and sums in float32."""
        m, k, n = tiling
        if shape.of == "matrices":
            return 4 * (m * k + m * n + k * n) + 4 * k * n
        return 4 * (m * k + k * n + m * n) + 4 * m * n

    # Cores share the blocks of the last dimension.
    of_outer = [n for n in _divisors(outer) if n <= outer // cores]
    of_inner = [k for k in _divisors(inner) if k <= most]
    tilings = [(rows, k, n) for k in of_inner for n in of_outer if k * n <= 4 * _MIB]
    fitting = [tiling for tiling in tilings if size(tiling) <= vmem // 2]
    return max(fitting, key=lambda tiling: (tiling[1] * tiling[2], tiling[1]), default=None)


def _divisors(dimension: int) -> list[int]:
    return [size for size in range(128, dimension + 1, 128) if dimension % size == 0]


def case(setting: Setting, shape: shapes.GroupedMatmul, slice_name: str) -> kernel_cost.Case:
    """Returns the program to cost."""
    return kernel_cost.Case(
        f"{__name__}:grouped_matmul",
        slice_name,
        {"setting": dataclasses.asdict(setting), "shape": dataclasses.asdict(shape)},
        # Neither says itself what it may use; the default is 16 MiB.
        {"xla_tpu_scoped_vmem_limit_kib": str(_vmem(slice_name) // 1024)},
    )


def grouped_matmul(
    devices: Sequence[jax.Device], *, setting: Mapping, shape: Mapping
) -> jax.stages.Lowered:
    """Lowers a peer for one device; `shape` has `shapes.GroupedMatmul`'s fields, `setting` `Setting`'s.

    Sizes of groups are constants of the program, so that the cost model knows what is visited.
    """
    chosen, wanted, device = Setting(**setting), shapes.GroupedMatmul(**shape), devices[0]
    run = _ragged_dot if chosen.peer == "ragged_dot" else _megablox
    arrays = [topology.array(x, "bfloat16", device) for x in wanted.operands()]
    with _constant_metadata(wanted.sizes()):
        return jax.jit(lambda a, b: run(a, b, chosen, wanted)).lower(*arrays)


def tables(devices: Sequence[jax.Device], *, shape: Mapping) -> jax.stages.Lowered:
    """Lowers what makes the tables of megablox from sizes that are data."""
    wanted, device = shapes.GroupedMatmul(**shape), devices[0]

    def run(sizes_E):
        return megablox.make_group_metadata(
            group_sizes=sizes_E,
            m=wanted.rows,
            tm=512,
            start_group=jnp.int32(0),
            num_nonzero_groups=wanted.groups,
            visit_empty_groups=wanted.of == "matrices",
        )

    return jax.jit(run).lower(topology.array((wanted.groups,), "int32", device))


def _ragged_dot(a, b, setting: Setting, shape: shapes.GroupedMatmul):
    if shape.of == "rows":
        b = jnp.swapaxes(b, 1, 2)  # XLA does that itself, and then ignores the tiling
    contracted = 0 if shape.of == "matrices" else 1
    grouped = [] if shape.of == "matrices" else [0]
    dims = jax.lax.RaggedDotDimensionNumbers(
        (((contracted,), (contracted,)), ((), ())), [0], grouped
    )
    told = contextlib.nullcontext()
    if setting.tiling is not None:
        told = xla_metadata.set_xla_metadata(ragged_dot_tiling=",".join(map(str, setting.tiling)))
    with told:
        sizes = shape.sizes()
        return jax.lax.ragged_dot_general(a, b, sizes, dims, preferred_element_type=a.dtype)


def _megablox(a, b, setting: Setting, shape: shapes.GroupedMatmul):
    how = {"preferred_element_type": a.dtype, "tiling": tuple(setting.tiling)}
    sizes = jnp.asarray(shape.sizes())
    if shape.of == "matrices":
        return megablox.tgmm(a.T, b, sizes, **how)
    return megablox.gmm(a, b, sizes, transpose_rhs=shape.of == "rows", **how)


@contextlib.contextmanager
def _constant_metadata(sizes_E: np.ndarray):
    """Makes megablox compute its tables while it is traced."""
    original = megablox.make_group_metadata

    def make(**how):
        with jax.ensure_compile_time_eval():
            how |= {"group_sizes": jnp.asarray(sizes_E), "start_group": jnp.int32(0)}
            (offsets, *others), num_tiles = jax.tree.map(np.asarray, original(**how))
        # One more, which nothing reads: the compiler would compute evenly spaced ones, which the cost
        # model cannot follow.
        offsets = np.append(offsets, offsets[-1])
        return (offsets, *others), num_tiles

    megablox.make_group_metadata = make
    megablox.gmm.clear_cache()
    megablox.tgmm.clear_cache()
    try:
        yield
    finally:
        megablox.make_group_metadata = original
