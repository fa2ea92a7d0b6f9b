"""Attention by TPU kernels: layouts, devices and gradients around the kernel of one device."""

import dataclasses
import functools
from typing import Any

import jax
from jax import ad_checkpoint
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.kernels import placement
from llm_jax.kernels.flash_attention import backward
from llm_jax.kernels.flash_attention import backward_plan
from llm_jax.kernels.flash_attention import backward_visits
from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import blocks as blocks_lib
from llm_jax.kernels.flash_attention import chunked
from llm_jax.kernels.flash_attention import devices
from llm_jax.kernels.flash_attention import dropout as dropout_lib
from llm_jax.kernels.flash_attention import forward
from llm_jax.kernels.flash_attention import forward_visits
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import scores as scores_lib


@dataclasses.dataclass(frozen=True)
class _Static:
    scale: float
    softcap: float | None
    q_offset: int | None
    chunk: int
    blocks: blocks_lib.Blocks
    is_interpreted: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
    """A mask of arrays with its tables for the kernels, from `prepare`: the same for all layers.

    Attributes:
      forward, backward: which blocks the kernels visit; of each device's rows, side by side.
      made_for: what the tables follow from beside the mask.
    """

    mask: masks.Mask
    forward: forward_visits.Visits
    backward: tuple[backward_visits.Visits, ...]
    made_for: tuple[Any, ...] = dataclasses.field(metadata={"static": True})


def prepare(
    mask: masks.Mask,
    like_BT: jax.Array,
    *,
    num_keys: int,
    widths: tuple[int, int],
    group: int,
    dtype: jax.typing.DTypeLike,
    device_kind: str,
    bias: biases.Bias | None = None,
    blocks: blocks_lib.Blocks | None = None,
) -> masks.Mask | Prepared:
    """Returns the mask with its tables made, to be given to `attention` by many layers.

    A mask without arrays comes back as it is: its tables are constants.

    Args:
      like_BT: any array whose rows and slots lie where those of the queries do.
      num_keys: S.
      widths: of queries and of values.
      group: query heads of a key head on a device.
      dtype: of queries, keys and values.
      device_kind, bias, blocks: as for `attention`.
    """
    if masks.is_static(mask):
        return mask
    T = like_BT.shape[1]
    chosen = blocks or blocks_lib.for_device(device_kind, widths[0], T)
    made_for = _made_for(T, num_keys, widths, group, dtype, bias, 0, chosen)
    mask = placement.like_queries({"mask": mask}, like_BT)["mask"]
    # Of a bias only shapes matter: its arrays stay where they are.
    shape_of_bias = jax.eval_shape(lambda: bias)

    def local(mask):
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape_of_bias)
        parts = scores_lib.Parts(mask, blank, *(None,) * 3, scale=1.0, softcap=None)
        sizes = forward.fitted(chosen.forward, mask, (T, num_keys), widths, dtype, 0, blank)
        backward_sizes = group, *widths, jnp.dtype(dtype).itemsize
        fitted = chosen.backward.fit(T, num_keys)
        return (
            forward_visits.make_visits(mask, T, num_keys, sizes),
            backward_plan.make_visits(parts, fitted, T, num_keys, backward_sizes, 0),
        )

    if not jax.sharding.get_abstract_mesh().empty:
        row_axes = (*jax.typeof(like_BT).sharding.spec, None)[0]
        local = jax.shard_map(local, out_specs=PartitionSpec(row_axes), check_vma=False)
    return Prepared(mask, *local(mask), made_for)


def _made_for(T, S, widths, group, dtype, bias, q_offset, blocks) -> tuple[Any, ...]:
    kind = None if bias is None else jax.tree.structure(bias)
    return T, S, *widths, group, jnp.dtype(dtype).name, kind, q_offset, blocks


def attention(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    mask: masks.Mask | Prepared,
    scale: float,
    chunk: int,
    device_kind: str,
    q_offset: jax.Array | int = 0,
    softcap: float | None = None,
    bias: biases.Bias | None = None,
    sinks_KG: jax.Array | None = None,
    dropout: dropout_lib.Dropout | None = None,
    blocks: blocks_lib.Blocks | None = None,
) -> jax.Array:
    """As `reference.attention`, by the kernels of `forward` and `backward` on each device.

    Args:
      chunk: queries at a time where a gradient is `chunked`'s: that of a bias, if it is asked for.
      device_kind: what the program is compiled for, as in `jax.Device.device_kind`.
      blocks: instead of those of `blocks.for_device`.

    Raises:
      ValueError: a device without kernels, or a score, length or sharding that they do not take.
    """
    chosen = blocks or blocks_lib.for_device(device_kind, q_BTKGC.shape[-1], q_BTKGC.shape[1])
    reason = refusal(q_BTKGC, v_BSKC, bias, chosen)
    if reason is not None:
        raise ValueError(f"attention 'pallas' {reason}; use 'chunked'")
    is_known = isinstance(q_offset, int)
    k_BSKC, v_BSKC = (_with_all_keys(x) for x in (k_BSKC, v_BSKC))
    if isinstance(mask, Prepared):
        _check_prepared(mask, q_BTKGC, v_BSKC, bias, q_offset if is_known else None, chosen)
    static = _Static(
        scale,
        softcap,
        q_offset if is_known else None,
        chunk,
        chosen,
        device_kind == "cpu",
    )
    extra = (mask, bias, sinks_KG, dropout, None if is_known else q_offset)
    return _attention(static, q_BTKGC, k_BSKC, v_BSKC, *extra)


def _with_all_keys(x_BSKC: jax.Array) -> jax.Array:
    """Gathers keys or values that are cut along the sequence: each device's queries see all of them."""
    row_axes, length_axes, *others = (*jax.typeof(x_BSKC).sharding.spec, None, None)
    if not placement.is_cut(length_axes):
        return x_BSKC
    return jax.sharding.reshard(x_BSKC, PartitionSpec(row_axes, None, *others[:2]))


def _check_prepared(prepared: Prepared, q_BTKGC, v_BSKC, bias, q_offset, blocks) -> None:
    (_, T, _, G, C), (_, S, _, Cv) = q_BTKGC.shape, v_BSKC.shape
    group = G // placement.num_parts(devices.axes_of(q_BTKGC).g)
    wanted = _made_for(T, S, (C, Cv), group, q_BTKGC.dtype, bias, q_offset, blocks)
    if prepared.made_for != wanted:
        names = "T", "S", "width", "values' width", "group", "dtype", "bias", "q_offset", "blocks"
        others = (
            f"{name} = {has} and not {wants}"
            for name, has, wants in zip(names, prepared.made_for, wanted)
            if has != wants
        )
        raise ValueError(f"attention 'pallas' got tables prepared for {', '.join(others)}")


def refusal(
    q_BTKGC: jax.Array, v_BSKC: jax.Array, bias: biases.Bias | None, blocks: blocks_lib.Blocks
) -> str | None:
    """Returns why the kernels do not take these arguments, or None where they do."""
    lengths, widths = (q_BTKGC.shape[1], v_BSKC.shape[1]), (q_BTKGC.shape[-1], v_BSKC.shape[-1])
    full, dtype = masks.full(), q_BTKGC.dtype
    if forward.fitted(blocks.forward, full, lengths, widths, dtype, bias=bias) is None:
        beside = "" if bias is None else f" beside a bias of kind {type(bias).__name__}"
        return (
            f"holds {blocks.forward.kv} keys and values of a head in VMEM: widths {widths[0]} and"
            f" {widths[1]} need more than {forward.VMEM_LIMIT >> 20} MiB{beside}"
        )
    if isinstance(bias, biases.Relative):
        num_exact = bias.table_KGU.shape[-1] // (4 if bias.is_bidirectional else 2)
        if bias.max_distance <= num_exact:
            return (
                f"needs a table whose distances go past the {num_exact} that have buckets of their own,"
                f" not to {bias.max_distance}"
            )
        needed = backward_plan.table_bytes(bias, blocks.backward)
        if needed > blocks.backward.vmem_bytes // 2:
            return (
                f"holds tiles of a table in VMEM: distances to {bias.max_distance} need"
                f" {needed >> 20} MiB of {blocks.backward.vmem_bytes >> 21}"
            )
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, *arrays):
    return _forward(static, *arrays)[0]


def _forward(static, *arrays):
    """Returns the result, and what the backward pass needs, under names that remat can keep."""
    local = functools.partial(_forward_on_one_device, static)
    y_BTKGC, lse_BKGT = devices.on_each(local, ("BTKGC", "BKGT"), arrays)
    y_BTKGC = ad_checkpoint.checkpoint_name(y_BTKGC, "attention_output")
    lse_BKGT = ad_checkpoint.checkpoint_name(lse_BKGT, "attention_logsumexp")
    return y_BTKGC, (arrays, y_BTKGC, lse_BKGT)


def _parted(mask: masks.Mask | Prepared) -> tuple[masks.Mask, Any, Any]:
    """Returns a mask, and the tables of both kernels if they are made."""
    if isinstance(mask, Prepared):
        return mask.mask, mask.forward, mask.backward
    return mask, None, None


def _parts(static, axes: devices.Axes, q_BTKGC, mask, bias, dropout, q_offset) -> scores_lib.Parts:
    """Returns the parts of this device's attention; `q_offset` is None where `static` knows it."""
    origin = None
    if dropout is not None:
        origin = devices.origin(axes, q_BTKGC, devices.offset(axes.length, q_BTKGC.shape[1]))
    return scores_lib.Parts(
        mask,
        bias,
        dropout,
        q_offset,
        origin,
        scale=static.scale,
        softcap=static.softcap,
        static_offset=static.q_offset or 0,
    )


def _own_offset(static, axes: devices.Axes, q_offset: jax.Array | None, T: int) -> jax.Array | None:
    """Returns the slot of this device's first query, or None where `static` knows it."""
    if not placement.is_cut(axes.length):
        return q_offset
    return (static.q_offset if q_offset is None else q_offset) + devices.offset(axes.length, T)


def _forward_on_one_device(
    static, axes, q_BTKGC, k_BSKC, v_BSKC, mask, bias, sinks_KG, dropout, q_offset
):
    B, T, K, G, _ = q_BTKGC.shape
    q_offset = _own_offset(static, axes, q_offset, T)
    offset = static.q_offset if q_offset is None else q_offset
    mask, visits, _ = _parted(mask)
    S, widths = k_BSKC.shape[1], (q_BTKGC.shape[-1], v_BSKC.shape[-1])
    sizes = static.blocks.forward
    blocks = forward.fitted(sizes, mask, (T, S), widths, q_BTKGC.dtype, offset, bias)
    y_BHTC, lse_BHT = forward.attention(
        *(devices.heads_first(x) for x in (q_BTKGC, k_BSKC, v_BSKC)),
        parts=_parts(static, axes, q_BTKGC, mask, bias, dropout, q_offset),
        visits=visits or forward_visits.make_visits(mask, T, S, blocks, offset),
        blocks=blocks,
        sinks_H=None if sinks_KG is None else sinks_KG.reshape(-1),
        q_offset=offset,
        interpret=static.is_interpreted,
    )
    y_BTKGC = jnp.swapaxes(y_BHTC, 1, 2).reshape(B, T, K, G, -1)
    return y_BTKGC, lse_BHT.reshape(B, K, G, T)


def _backward_on_one_device(
    static,
    is_shared,
    axes,
    q_BTKGC,
    k_BSKC,
    v_BSKC,
    mask,
    bias,
    sinks_KG,
    dropout,
    q_offset,
    dy_BTKGC,
    lse_BKGT,
    delta_BKGT,
):
    del sinks_KG  # the logsumexp holds them
    B, T, K, G, _ = q_BTKGC.shape
    q_offset = _own_offset(static, axes, q_offset, T)
    mask, _, visits = _parted(mask)
    dq, dk, dv, dbias = backward.attention(
        *(devices.heads_first(x) for x in (q_BTKGC, k_BSKC, v_BSKC, dy_BTKGC)),
        lse_BKGT.reshape(B, K * G, T),
        delta_BKGT.reshape(B, K * G, T),
        parts=_parts(static, axes, q_BTKGC, mask, bias, dropout, q_offset),
        q_offset=static.q_offset if q_offset is None else q_offset,
        blocks=static.blocks.backward.fit(T, k_BSKC.shape[1]),
        visits=visits,
        interpret=static.is_interpreted,
    )
    dk, dv = (jnp.swapaxes(x, 1, 2) for x in (dk, dv))
    for names in (axes.length, axes.g):
        if placement.is_cut(names):  # of these queries alone
            dk, dv = (jax.lax.psum(x, names) for x in (dk, dv))
    found = jnp.swapaxes(dq, 1, 2).reshape(q_BTKGC.shape), dk, dv
    if dbias is None:
        return found
    (array,) = jax.tree.leaves(dbias)
    # Rows, queries and heads that share a value, wherever they lie.
    for names, is_summed in zip(axes, is_shared):
        if names is not None and is_summed:
            array = jax.lax.psum(array, names)
    return *found, array


def _backward(static, residuals, dy_BTKGC):
    arrays, y_BTKGC, lse_BKGT = residuals
    *qkv, mask, bias, sinks_KG, dropout, q_offset = arrays
    delta_BTKG = jnp.sum(dy_BTKGC.astype(jnp.float32) * y_BTKGC.astype(jnp.float32), -1)
    delta_BKGT = jnp.moveaxis(delta_BTKG, 1, 3)
    more = ("BTKGC", dy_BTKGC), ("BKGT", lse_BKGT), ("BKGT", delta_BKGT)
    outs, is_shared = ["BTKGC", "BSKC", "BSKC"], (True, True, False, False)
    if isinstance(bias, biases.Relative):
        outs.append("KGU")
    elif isinstance(bias, biases.Full):
        of_row, of_k, of_g = (size == 1 for size in bias.bias_BKGTS.shape[:3])
        is_shared = (of_row, False, of_k, of_g)
        letters = ("1" if is_one else letter for letter, is_one in zip("BKG", (of_row, of_k, of_g)))
        outs.append("".join(letters) + "TS")
    local = functools.partial(_backward_on_one_device, static, is_shared)
    dq, dk, dv, *made = devices.on_each(local, outs, arrays, more)
    dsinks = None
    if sinks_KG is not None:
        # A sink is a key whose value is zero: its weight times what the others lose to it.
        weights_BKGT = jnp.exp(sinks_KG[..., None] - lse_BKGT)
        dsinks = -jnp.sum(weights_BKGT * delta_BKGT, axis=(0, 3)).astype(sinks_KG.dtype)
    dmask, ddropout, doffset = (devices.no_gradient(x) for x in (mask, dropout, q_offset))
    if made:
        dbias = jax.tree.unflatten(jax.tree.structure(bias), made)
    else:
        dbias = _bias_gradient(static, arrays, dy_BTKGC)
    return dq, dk, dv, dmask, dbias, dsinks, ddropout, doffset


def _bias_gradient(static, arrays, dy_BTKGC):
    """Returns the gradient of slopes. Where nobody asks for it the compiler leaves all of it out."""
    *qkv, mask, bias, sinks_KG, dropout, q_offset = arrays
    if bias is None:
        return None

    def run(bias):
        return chunked.attention(
            *qkv,
            mask=_parted(mask)[0],
            scale=static.scale,
            chunk=static.chunk,
            q_offset=static.q_offset if q_offset is None else q_offset,
            softcap=static.softcap,
            bias=bias,
            sinks_KG=sinks_KG,
            dropout=dropout,
        )

    return jax.vjp(run, bias)[1](dy_BTKGC)[0]


_attention.defvjp(_forward, _backward)
