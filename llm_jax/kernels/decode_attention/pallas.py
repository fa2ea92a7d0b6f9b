"""Attention to a cache by the TPU kernel: devices and layouts around the kernel of one device.

The kernel reads each visible page once, for all heads, and takes heads together in packs that fill the
lanes: a pack's queries are block-diagonal, so that two heads of 64 share one product with a page.
"""

import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from llm_jax.kernels import placement
from llm_jax.kernels.decode_attention import caches
from llm_jax.kernels.decode_attention import kernel as kernel_lib
from llm_jax.kernels.decode_attention import paged
from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import scores as scores_lib

_MIB = 2**20
_LANES = 128
# What the slots of a contiguous cache should be a multiple of, so that a copy takes as many.
SLOTS = 128
# Of the 128 MiB that a v5e or v6e has.
_VMEM_LIMIT = 100 * _MIB
_BUFFER_LIMIT = 32 * _MIB  # of keys and values in flight
_BLOCK_BYTES = 2 * _MIB  # of keys and values: long enough to hide what a block costs by itself
_LEAST_BLOCK, _MOST_BLOCK = 256, 2048  # slots
_QUERY_LIMIT = 8 * _MIB  # of the queries of one program
_TABLE_LIMIT = 512 * 2**10  # of scalar memory


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How the work is cut.

    Attributes:
      block: slots that are computed at a time; None: as many as `_BLOCK_BYTES` hold.
      page, window_page: slots of a contiguous cache that are copied at a time, and with a window.
      ring: blocks in flight and in use.
      lag: packs of heads whose weights are under way before the first sum of values.
      lanes: of a pack; what the matrix unit contracts at a time.
      cores: of a device; each takes a share of the rows.
    """

    block: int | None = None
    page: int = 128
    window_page: int = 32
    ring: int = 4
    lag: int = 4
    lanes: int = _LANES
    cores: int = 1


# By the kind of device, as JAX names it. Those of v5e and v6e won a search by modelled time; for the
# others nothing was searched.
_BY_DEVICE = {
    "TPU v4": Sizes(cores=2),
    "TPU v5 lite": Sizes(),
    "TPU v5": Sizes(cores=2),
    "TPU v6 lite": Sizes(),
    "TPU7x": Sizes(),
    # Interpreted, for tests.
    "cpu": Sizes(),
}
Cache = caches.Contiguous | paged.Paged


def is_known(device_kind: str) -> bool:
    """Returns whether the kernel has sizes for a device."""
    return device_kind in _BY_DEVICE


def layout_refusal(
    num_heads: int, width: int, page: int, dtype: jax.typing.DTypeLike, device_kind: str
) -> str | None:
    """Returns why the kernel does not take a cache, or None where it does.

    Args:
      num_heads, width: K and C of one device.
      page: slots of a page, or of a whole contiguous cache.
      dtype: of the cache.
      device_kind: what the program is compiled for, as in `jax.Device.device_kind`.
    """
    if not is_known(device_kind):
        return f"has no sizes for {device_kind!r}, only for {', '.join(_BY_DEVICE)}"
    if device_kind == "cpu":
        return None  # interpreted, where nothing has to be aligned
    if width % _LANES and _LANES % width or num_heads * width % _LANES:
        return (
            f"takes heads that fill lanes of {_LANES}: [K, C] = [{num_heads}, {width}] on a device"
            f" do not; use a C that divides {_LANES} or is a multiple of it, and K * C a multiple"
        )
    is_int8 = jnp.dtype(dtype) == jnp.int8
    tile = _LANES if is_int8 else 32 // jnp.dtype(dtype).itemsize
    if page % tile:
        return (
            f"takes pages of {jnp.dtype(dtype)} with a multiple of {tile} slots, not {page};"
            " allocate other pages (of a contiguous cache: other slots)"
        )
    return None


def bias_refusal(bias: type[biases.Bias] | None) -> str | None:
    """Returns why the kernel does not take a kind of bias, or None where it does."""
    if bias in (None, biases.Alibi):
        return None
    return f"takes slopes alone, no bias of kind {bias.__name__}; use 'auto' or 'reference'"


def refusal(
    q_BTKGC: jax.Array, cache: Cache, device_kind: str, bias: biases.Bias | None = None
) -> str | None:
    """Returns why the kernel does not take these arguments, or None where it does."""
    reason = bias_refusal(None if bias is None else type(bias))
    if reason is not None:
        return reason
    axes = _axes(q_BTKGC)
    row_axes, length_axes, head_axes, _, width_axes = axes
    if any(map(placement.is_cut, (length_axes, width_axes))):
        return f"cuts rows, key heads and groups alone, queries are sharded {axes}"
    if isinstance(cache, paged.Paged):
        needed = 4 * cache.table.size // placement.num_parts(row_axes)
        if needed > _TABLE_LIMIT:
            return (
                f"holds the page table in scalar memory: [B, pages] = {cache.table.shape} needs"
                f" {needed >> 10} KiB of {_TABLE_LIMIT >> 10}; use larger pages"
            )
    num_heads = q_BTKGC.shape[2] // placement.num_parts(head_axes)
    return layout_refusal(num_heads, q_BTKGC.shape[4], *_page_and_dtype(cache), device_kind)


@dataclasses.dataclass(frozen=True)
class _Static:
    scale: float
    softcap: float | None
    window: int | None
    is_causal: bool
    sizes: Sizes
    is_interpreted: bool


def attention(
    q_BTKGC: jax.Array,
    cache: Cache,
    *,
    lengths_B: jax.Array,
    starts_B: jax.Array,
    scale: float,
    device_kind: str,
    window: int | None = None,
    softcap: float | None = None,
    bias: biases.Alibi | biases.Relative | None = None,
    sinks_KG: jax.Array | None = None,
    is_causal: bool = True,
    sizes: Sizes | None = None,
) -> jax.Array:
    """As `op.attention`, by the kernel on each device: rows and heads lie as the queries do.

    Args:
      device_kind: what the program is compiled for, as in `jax.Device.device_kind`.
      sizes: instead of those of the device.

    Raises:
      ValueError: a device, layout, sharding or bias that the kernel does not take.
    """
    static = _Static(
        scale,
        softcap,
        window,
        is_causal,
        sizes or _BY_DEVICE.get(device_kind, Sizes()),
        device_kind == "cpu",
    )
    reason = refusal(q_BTKGC, cache, device_kind, bias)
    if reason is not None:
        raise ValueError(f"decode attention 'pallas' {reason}")
    row_axes, _, head_axes, group_axes, _ = _axes(q_BTKGC)
    run = functools.partial(_on_one_device, static)
    if not (row_axes or head_axes or group_axes):
        return run(q_BTKGC, cache, lengths_B, starts_B, bias, sinks_KG)
    cache = jax.tree.map(jax.sharding.reshard, cache, _cache_specs(cache, row_axes, head_axes))
    out_specs = PartitionSpec(row_axes, None, head_axes, group_axes, None)
    run = jax.shard_map(run, out_specs=out_specs, check_vma=False)
    return run(q_BTKGC, cache, lengths_B, starts_B, bias, sinks_KG)


def _axes(q_BTKGC: jax.Array) -> tuple:
    return (*jax.typeof(q_BTKGC).sharding.spec, *(None,) * 5)[:5]


def _page_and_dtype(cache: Cache) -> tuple[int, np.dtype]:
    if isinstance(cache, paged.Paged):
        return cache.kv_pages.shape[2], cache.kv_pages.dtype
    return cache.num_slots, cache.kv_B2SW.dtype


def _cache_specs(cache: Cache, row_axes, head_axes) -> Cache:
    """Returns where the arrays of a cache belong; a pool of pages is whole for all rows."""
    if isinstance(cache, paged.Paged):
        return dataclasses.replace(
            cache,
            kv_pages=PartitionSpec(None, None, None, head_axes),
            scales_pages=None
            if cache.scales_pages is None
            else PartitionSpec(None, None, head_axes, None),
            table=PartitionSpec(row_axes, None),
        )
    return dataclasses.replace(
        cache,
        kv_B2SW=PartitionSpec(row_axes, None, None, head_axes),
        scales_B2KS=None
        if cache.scales_B2KS is None
        else PartitionSpec(row_axes, None, head_axes, None),
    )


# --- one device -----------------------------------------------------------------------------------


def _on_one_device(static, q_BTKGC, cache, lengths_B, starts_B, bias, sinks_KG):
    B, T, K, G, C = q_BTKGC.shape
    if not static.is_causal and T > 1:
        # Queries that see the same slots are to the kernel as many groups of one query.
        folded_B1KRC = jnp.moveaxis(q_BTKGC, 1, 3).reshape(B, 1, K, G * T, C)
        sinks_KR = None if sinks_KG is None else jnp.repeat(sinks_KG, T, axis=1)
        y_B1KRC = _on_one_device(static, folded_B1KRC, cache, lengths_B, starts_B, None, sinks_KR)
        return jnp.moveaxis(y_B1KRC.reshape(B, K, G, T, C), 3, 1)
    heads = _heads_of_a_pack(K, C, static.sizes.lanes)
    # With the base-2 exponent too, unless the scores are changed after.
    factor = static.scale * (scores_lib.LOG2E if static.softcap is None else 1.0)
    q_BTKGC = (q_BTKGC.astype(jnp.float32) * factor).astype(q_BTKGC.dtype)
    q_BJRW = _pack_queries(q_BTKGC, heads)
    R = q_BJRW.shape[2]
    arguments = {"query": _lanes(np.arange(R) // G % T, jnp.int32)}
    if isinstance(cache, paged.Paged):
        scalars = {"table": cache.table.reshape(-1)}
        arguments |= {"kv": cache.kv_pages, "scales": cache.scales_pages}
    else:
        scalars = {}
        arguments |= {"kv": cache.kv_B2SW, "scales": cache.scales_B2KS}
    if arguments["scales"] is None:
        del arguments["scales"]
    elif heads > 1:
        arguments["head"] = _lanes(np.arange(R) // (T * G), jnp.int32)
    if bias is not None:
        arguments["slopes"] = _by_row(bias.slopes_KG * scores_lib.LOG2E, heads, T, R)
    if sinks_KG is not None:
        arguments["sinks"] = _by_row(sinks_KG * scores_lib.LOG2E, heads, T, R)
    scalars = {"lengths": lengths_B, "starts": starts_B} | scalars
    inner = _kernel_static(static, cache, q_BJRW.shape, T, heads)
    o_BJRW = _call(inner, static, scalars, {"q": q_BJRW} | arguments)
    return _unpack_output(o_BJRW, q_BTKGC.shape, heads)


def _heads_of_a_pack(K: int, C: int, lanes: int) -> int:
    """Returns how many heads, of those that divide K, fit into the lanes of a pack."""
    return max(n for n in range(1, K + 1) if K % n == 0 and (n == 1 or n * C <= lanes))


def _pack_queries(q_BTKGC: jax.Array, heads: int) -> jax.Array:
    """Returns [B, J, R, W]: a pack's queries by head, query, group, each in its head's lanes."""
    B, T, K, G, C = q_BTKGC.shape
    q_BJPTGC = jnp.moveaxis(q_BTKGC, 1, 2).reshape(B, K // heads, heads, T, G, C)
    eye_P11P1 = jnp.eye(heads, dtype=q_BTKGC.dtype)[:, None, None, :, None]
    q_BJPTGPC = q_BJPTGC[..., None, :] * eye_P11P1
    q_BJRW = q_BJPTGPC.reshape(B, K // heads, heads * T * G, heads * C)
    rows = -(-q_BJRW.shape[2] // 8) * 8
    return jnp.pad(q_BJRW, ((0, 0), (0, 0), (0, rows - q_BJRW.shape[2]), (0, 0)))


def _unpack_output(o_BJRW: jax.Array, shape: tuple[int, ...], heads: int) -> jax.Array:
    B, T, K, G, C = shape
    o_BJPTGPC = o_BJRW[:, :, : heads * T * G].reshape(B, K // heads, heads, T, G, heads, C)
    own = [o_BJPTGPC[:, :, n, :, :, n] for n in range(heads)]
    o_BKTGC = jnp.stack(own, axis=2).reshape(B, K, T, G, C)
    return jnp.swapaxes(o_BKTGC, 1, 2)


def _lanes(x_R: np.ndarray, dtype) -> jax.Array:
    return jnp.asarray(np.broadcast_to(x_R[:, None], (len(x_R), _LANES)), dtype)


def _by_row(x_KG: jax.Array, heads: int, T: int, R: int) -> jax.Array:
    """Returns a value of each head for the rows of its queries, float32 [J, R, lanes]."""
    K, G = x_KG.shape
    x_KTG = jnp.broadcast_to(x_KG[:, None].astype(jnp.float32), (K, T, G))
    x_JR = x_KTG.reshape(K // heads, heads * T * G)
    x_JR = jnp.pad(x_JR, ((0, 0), (0, R - x_JR.shape[1])))
    return jnp.broadcast_to(x_JR[..., None], (*x_JR.shape, _LANES))


def _kernel_static(static, cache, q_shape, T, heads) -> kernel_lib.Static:
    B, J, R, W = q_shape
    sizes = static.sizes
    page, dtype = _page_and_dtype(cache)
    num_pages = None
    if isinstance(cache, paged.Paged):
        num_pages = cache.kv_pages.shape[0]
    else:
        # Around a window what a copy brings too much counts; int8 brings scales, which fill lanes.
        is_fine = static.window is not None and cache.scales_B2KS is None
        page = int(np.gcd(page, sizes.window_page if is_fine else sizes.page))
    slot_bytes = 2 * J * W * dtype.itemsize
    block = sizes.block or min(max(_BLOCK_BYTES // slot_bytes, _LEAST_BLOCK), _MOST_BLOCK)
    if static.window is not None and not sizes.block:
        block = min(block, max(static.window // 2, _LEAST_BLOCK))
    block = min(block, cache.num_slots, max(_BUFFER_LIMIT // (slot_bytes * sizes.ring), 1))
    row_bytes = J * R * max(W, _LANES) * 4
    rows = max(min(_QUERY_LIMIT // row_bytes, -(-B // sizes.cores)), 1)
    return kernel_lib.Static(
        num_rows=B,
        rows=rows,
        num_queries=T,
        page=page,
        pages=max(block // page, 1),
        pages_per_row=cache.num_slots // page,
        num_pages=num_pages,
        ring=sizes.ring,
        lag=sizes.lag,
        packs=J,
        heads=heads,
        softcap=static.softcap,
        window=static.window,
    )


def _call(inner: kernel_lib.Static, static: _Static, scalars, arguments) -> jax.Array:
    q_BJRW, kv = arguments["q"], arguments["kv"]
    B, J, R, W = q_BJRW.shape

    def whole(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda i, *_: (0,) * array.ndim)

    of_rows = pl.BlockSpec((inner.rows, J, R, W), lambda i, *_: (i, 0, 0, 0))
    outside = pl.BlockSpec(memory_space=pl.ANY)
    specs = {name: whole(array) for name, array in arguments.items()}
    specs |= {name: outside for name in ("kv", "scales") if name in specs} | {"q": of_rows}
    scratch = {"kv_buffer": pltpu.VMEM((inner.ring, 2, inner.block, J * W), kv.dtype)}
    if "scales" in arguments:
        shape = (inner.ring, 2, J * inner.heads, inner.block)
        scratch["scales_buffer"] = pltpu.VMEM(shape, jnp.float32)
    scratch["x"] = pltpu.VMEM((J, R, inner.block), jnp.float32)
    scratch |= {name: pltpu.VMEM((J, R, _LANES), jnp.float32) for name in ("m", "l")}
    scratch["acc"] = pltpu.VMEM((J, R, W), jnp.float32)
    scratch["sems"] = pltpu.SemaphoreType.DMA((2, inner.ring))
    names = (*scalars, *arguments, "o", *scratch)
    room = B * inner.pages_per_row * inner.page * 2 * J * W
    return pl.pallas_call(
        functools.partial(kernel_lib.kernel, static=inner, names=names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(-(-B // inner.rows),),
            in_specs=list(specs.values()),
            out_specs=of_rows,
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=jax.ShapeDtypeStruct((B, J, R, W), q_BJRW.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=_VMEM_LIMIT,
            # Scalar work for every page: 13% of the time of int8 on a v6e, modelled. The kernel clips
            # rows, pages and their numbers itself.
            disable_bounds_checks=True,
        ),
        # Of full rows: how full they are is known when the program runs.
        cost_estimate=pl.CostEstimate(
            flops=2 * room * R,
            transcendentals=room * R // (2 * W),
            bytes_accessed=room * kv.dtype.itemsize,
        ),
        interpret=static.is_interpreted,
        name="decode_attention",
    )(*scalars.values(), *arguments.values())
