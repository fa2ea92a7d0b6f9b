"""The kernels as programs for a TPU, lowered from sizes in words: targets of `aot.kernel_cost.Case`."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as config_lib
from llm_jax import mesh as mesh_lib
from llm_jax.aot import topology
from llm_jax.kernels.costing import shapes
from llm_jax.kernels.cross_entropy import op as cross_entropy_op
from llm_jax.kernels.decode_attention import caches
from llm_jax.kernels.decode_attention import op as decode_op
from llm_jax.kernels.decode_attention import paged
from llm_jax.kernels.decode_attention import pallas as decode_pallas
from llm_jax.kernels.flash_attention import blocks as blocks_lib
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import pallas
from llm_jax.kernels.grouped_matmul import pallas as grouped_pallas
from llm_jax.kernels.grouped_matmul import visits


def attention(
    devices: Sequence[jax.Device], *, shape: dict, layout: str = "BHTC", blocks: dict | None = None
) -> jax.stages.Lowered:
    """Lowers `flash_attention.pallas` for one device.

    Args:
      devices: the first one is used.
      shape: fields of `shapes.Attention`.
      layout: "BHTC", as the kernels hold arrays: they are all there is. "BTHC": as models hold them,
        with the copies that the compiler makes of that.
      blocks: fields of the "forward" and "backward" sizes that differ from the table's.

    Raises:
      ValueError: what the kernels or the sizes do not take.
    """
    case, device = shapes.Attention(**shape), devices[0]
    chosen = blocks_of(device.device_kind, case.width, case.length, **(blocks or {}))
    return lower(attend(case, device.device_kind, chosen, layout), case, device, layout)


def attend(
    shape: shapes.Attention, device_kind: str, blocks: blocks_lib.Blocks, layout: str
) -> Callable[[Mapping[str, jax.Array]], jax.Array]:
    """Returns the operation as a function of its arrays by name: q, k, v, sinks, the bias'."""
    mask = shape.make_mask()
    if not masks.is_static(mask):
        prepared = pallas.prepare(
            mask,
            jnp.zeros((shape.batch, shape.length)),
            num_keys=shape.length,
            widths=(shape.width, shape.value_width or shape.width),
            group=shape.heads // (shape.key_heads or shape.heads),
            dtype=shape.dtype,
            device_kind=device_kind,
            bias=jax.eval_shape(lambda: shape.make_bias(_zeros(shape.bias_arrays()))),
            blocks=blocks,
        )
        # Constants of the program, so that the cost model knows what is visited.
        mask = jax.tree.map(np.asarray, prepared)

    def run(arrays):
        q, k, v = (_laid(arrays[name], layout) for name in ("q", "k", "v"))
        y_BTKGC = pallas.attention(
            q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1]),
            k,
            v,
            mask=mask,
            scale=shape.width**-0.5,
            chunk=512,
            device_kind=device_kind,
            softcap=shape.softcap,
            bias=shape.make_bias(arrays),
            sinks_KG=arrays.get("sinks"),
            blocks=blocks,
        )
        return _laid(y_BTKGC.reshape(*q.shape[:3], -1), layout)

    return run


def _zeros(described: Mapping[str, tuple]) -> dict[str, jax.Array]:
    return {name: jnp.zeros(*one) for name, one in described.items()}


def decode(devices: Sequence[jax.Device], *, shape: dict) -> jax.stages.Lowered:
    """Lowers `decode_attention.pallas` for one device; `shape` has the fields of `shapes.Decode`.

    Lengths and tables are constants of the program, so that the cost model knows what is read. Where
    values are a part of keys it is the reference, which `auto` takes there too.
    """
    case, device = shapes.Decode(**shape), devices[0]
    if case.num_values is not None:
        return _decode_values_in_keys(case, device)
    B, K, G, C = len(case.lengths), case.key_heads, case.group, case.width
    table = case.page_table()

    def attend(q_BTKGC, kv, scales):
        cache = (
            caches.Contiguous(kv, scales, K)
            if case.page is None
            else paged.Paged(kv, scales, table, K)
        )
        return decode_pallas.attention(
            q_BTKGC,
            cache,
            lengths_B=np.asarray(case.lengths, np.int32),
            starts_B=np.zeros(B, np.int32),
            scale=C**-0.5,
            device_kind=device.device_kind,
            window=case.window,
        )

    rows, slots = (table.size, case.page) if case.page else (B, case.num_slots)
    scales = None
    if case.dtype == "int8":
        scales = topology.array((rows, 2, K, slots), "float32", device)
    q_BTKGC = topology.array((B, case.queries, K, G, C), "bfloat16", device)
    kv = topology.array((rows, 2, slots, K * C), case.dtype, device)
    return jax.jit(attend).lower(q_BTKGC, kv, scales)


def _decode_values_in_keys(case: shapes.Decode, device: jax.Device) -> jax.stages.Lowered:
    B, C = len(case.lengths), case.width

    def attend(q_BTKGC, k_BSC):
        return decode_op.attention(
            q_BTKGC,
            caches.ValuesInKeys(k_BSC, case.num_values),
            lengths_B=jnp.asarray(case.lengths, jnp.int32),
            scale=C**-0.5,
            window=case.window,
            implementation="reference",
        )

    q_BTKGC = topology.array((B, case.queries, 1, case.group, C), "bfloat16", device)
    k_BSC = topology.array((B, case.num_slots, C), case.dtype, device)
    return jax.jit(attend).lower(q_BTKGC, k_BSC)


def cross_entropy(devices: Sequence[jax.Device], *, shape: dict) -> jax.stages.Lowered:
    """Lowers a loss and its gradients for one device; `shape` has `shapes.CrossEntropy`'s fields."""
    case, device = shapes.CrossEntropy(**shape), devices[0]
    mesh = mesh_lib.make(config_lib.MeshConfig(), [device])

    def loss(x_BTD, head_VD, targets_BT, weights_BT):
        losses = cross_entropy_op.cross_entropy(
            x_BTD,
            head_VD,
            targets_BT,
            weights_BT,
            head_dims="VD",
            implementation=case.implementation,
            chunk=1024,
            z_loss=1e-4,
        )
        return losses.objective / jnp.sum(weights_BT), losses

    size, placed = (1, case.tokens), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays = {
        "x_BTD": ((*size, case.width), "bfloat16"),
        "head_VD": ((case.ids, case.width), "float32"),
        "targets_BT": (size, "int32"),
        "weights_BT": (size, "float32"),
    }
    structs = [jax.ShapeDtypeStruct(*one, sharding=placed) for one in arrays.values()]
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(*structs)


def grouped_matmul(devices: Sequence[jax.Device], *, shape: dict) -> jax.stages.Lowered:
    """Lowers `grouped_matmul.pallas` for one device; `shape` has `shapes.GroupedMatmul`'s fields.

    Sizes of groups are constants of the program, so that the cost model knows what is visited.
    """
    case, device = shapes.GroupedMatmul(**shape), devices[0]
    local, sizes_E = grouped_pallas.Pallas(device.device_kind), case.sizes()

    def run(a, b):
        if case.of == "matrices":
            return local.weight_gradient(a, b, sizes_E)
        return local.product(a, b, sizes_E, is_transposed=case.of == "rows")

    return jax.jit(run).lower(*(topology.array(x, "bfloat16", device) for x in case.operands()))


def grouped_matmul_tables(devices: Sequence[jax.Device], *, shape: dict) -> jax.stages.Lowered:
    """Lowers what makes the tables of `grouped_matmul.pallas` from sizes that are data."""
    case, device = shapes.GroupedMatmul(**shape), devices[0]

    def run(sizes_E):
        of_all_groups = case.of == "matrices"
        return visits.make(sizes_E, case.rows, 2048, of_all_groups=of_all_groups).tables

    return jax.jit(run).lower(topology.array((case.groups,), "int32", device))


def target(name: str) -> str:
    """Returns one of these functions as `aot.kernel_cost.Case` names it."""
    return f"{__name__}:{name}"


def lower(attend, case: shapes.Attention, device: jax.Device, layout: str) -> jax.stages.Lowered:
    """Lowers an attention of named arrays, or its result and gradients, for one device."""
    K, sinks = case.key_heads or case.heads, {}
    if case.has_sinks:
        sinks = {"sinks": ((K, case.heads // K), "float32")}

    def of(heads, width):
        sizes = {"B": case.batch, "T": case.length, "H": heads, "C": width}
        return tuple(sizes[letter] for letter in layout), case.dtype

    value_width = case.value_width or case.width
    wanted = {
        "q": of(case.heads, case.width),
        "k": of(K, case.width),
        "v": of(K, value_width),
    }
    extra = case.bias_arrays() | sinks

    def structs(described):
        return {name: topology.array(*one, device) for name, one in described.items()}

    if not case.has_gradient:
        return jax.jit(attend).lower(structs(wanted | extra))

    def gradients(arrays, others, dy):
        if case.has_bias_gradient:
            y, pull = jax.vjp(lambda a, b: attend(a | b), arrays, others)
        else:
            y, pull = jax.vjp(lambda a: attend(a | others), arrays)
        return y, pull(dy)

    dy = topology.array(*of(case.heads, value_width), device)
    return jax.jit(gradients).lower(structs(wanted), structs(extra), dy)


def _laid(x: jax.Array, layout: str) -> jax.Array:
    """Between the caller's layout and [B, T, H, C]."""
    return jnp.swapaxes(x, 1, 2) if layout == "BHTC" else x


def blocks_of(
    device_kind: str,
    width: int,
    length: int,
    forward: Mapping | None = None,
    backward: Mapping | None = None,
) -> blocks_lib.Blocks:
    """Returns the sizes for a device, with fields changed."""
    table = blocks_lib.for_device(device_kind, width, length)
    return blocks_lib.Blocks(
        dataclasses.replace(table.forward, **(forward or {})),
        dataclasses.replace(table.backward, **(backward or {})),
    )
