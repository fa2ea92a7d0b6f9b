"""Attention by TPU kernels: layouts, devices and gradients around the kernel of one device."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import chunked
from llm_jax.kernels.flash_attention import dropout as dropout_lib
from llm_jax.kernels.flash_attention import forward
from llm_jax.kernels.flash_attention import forward_visits
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import scores as scores_lib

# By the kind of device, as JAX names it. Those of v5e and v6e won a search by modelled time; nothing
# was searched for the others. A CPU interprets the kernel, for tests.
BLOCKS = {
    "TPU v5 lite": forward_visits.Blocks(lead=8, lag=1, slots=4),
    "TPU v6 lite": forward_visits.Blocks(),
    "TPU v5": forward_visits.Blocks(lead=8, lag=1, slots=4),
    "TPU v4": forward_visits.Blocks(lead=8, lag=1, slots=4),
    "TPU7x": forward_visits.Blocks(),
    "cpu": forward_visits.Blocks(q=256, kv=256, tile=128, chunk=128, lead=2, lag=1),
}


@dataclasses.dataclass(frozen=True)
class _Static:
    scale: float
    softcap: float | None
    q_offset: int | None
    chunk: int
    blocks: forward_visits.Blocks
    is_interpreted: bool


def attention(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    mask: masks.Mask,
    scale: float,
    chunk: int,
    device_kind: str,
    q_offset: jax.Array | int = 0,
    softcap: float | None = None,
    bias: biases.Bias | None = None,
    sinks_KG: jax.Array | None = None,
    dropout: dropout_lib.Dropout | None = None,
    blocks: forward_visits.Blocks | None = None,
) -> jax.Array:
    """As `reference.attention`; the forward pass by `forward.attention` on each device.

    The backward pass is that of `chunked`, `chunk` queries at a time.

    Args:
      device_kind: what the program is compiled for, as in `jax.Device.device_kind`.
      blocks: instead of those of `BLOCKS`.

    Raises:
      ValueError: a device without kernels, or a score, length or sharding that they do not take.
    """
    if device_kind not in BLOCKS:
        raise ValueError(
            f"attention 'pallas' has no blocks for {device_kind!r}, only for {[*BLOCKS]}"
        )
    if bias is not None and not isinstance(bias, biases.Alibi):
        raise ValueError(f"attention 'pallas' takes no bias of kind {type(bias).__name__}")
    is_known = isinstance(q_offset, int)
    static = _Static(
        scale,
        softcap,
        q_offset if is_known else None,
        chunk,
        blocks or BLOCKS[device_kind],
        device_kind == "cpu",
    )
    extra = (mask, bias, sinks_KG, dropout, None if is_known else q_offset)
    return _attention(static, q_BTKGC, k_BSKC, v_BSKC, *extra)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q_BTKGC, k_BSKC, v_BSKC, mask, bias, sinks_KG, dropout, q_offset):
    # Named where the scores are on one device: a kernel cannot be partitioned from outside.
    arrays = (q_BTKGC, k_BSKC, v_BSKC, mask, bias, sinks_KG, dropout, q_offset)
    q_spec = jax.typeof(q_BTKGC).sharding.spec
    row_axes, length_axes, k_axes, g_axes = (*q_spec, *(None,) * 4)[:4]
    if length_axes is not None:
        raise ValueError(f"attention 'pallas' needs whole sequences, queries are sharded {q_spec}")
    if dropout is not None and g_axes is not None:
        raise ValueError(f"attention 'pallas' has no dropout for groups that are sharded, {q_spec}")
    local = functools.partial(_on_one_device, static, row_axes, k_axes)
    if row_axes is None and k_axes is None and g_axes is None:
        return local(*arrays)
    axes = {"B": row_axes, "T": None, "S": None, "K": k_axes, "G": g_axes, "C": None}

    def spec(letters: str) -> PartitionSpec:
        return PartitionSpec(*(axes[letter] for letter in letters))

    def of_leaf(path, leaf):
        del leaf
        name = path[-1].name if path else "q_offset"
        suffix = name.rpartition("_")[2]
        return spec(suffix) if suffix.isupper() else PartitionSpec()

    in_specs = (
        spec("BTKGC"),
        spec("BSKC"),
        spec("BSKC"),
        *(jax.tree_util.tree_map_with_path(of_leaf, tree) for tree in (mask, bias)),
        None if sinks_KG is None else spec("KG"),
        *(jax.tree_util.tree_map_with_path(of_leaf, tree) for tree in (dropout, q_offset)),
    )
    run = jax.shard_map(local, in_specs=in_specs, out_specs=spec("BTKGC"), check_vma=False)
    return run(*arrays)


def _on_one_device(
    static, row_axes, k_axes, q_BTKGC, k_BSKC, v_BSKC, mask, bias, sinks_KG, dropout, q_offset
):
    B, T, K, G, _ = q_BTKGC.shape
    S = k_BSKC.shape[1]
    q_BHTC = jnp.transpose(q_BTKGC.reshape(B, T, K * G, -1), (0, 2, 1, 3))
    k_BKSC, v_BKSC = (jnp.swapaxes(x, 1, 2) for x in (k_BSKC, v_BSKC))
    offsets = (None, None)
    if dropout is not None:
        offsets = _offset(row_axes, B), _offset(k_axes, K * G)
    parts = scores_lib.Parts(
        mask,
        bias,
        dropout,
        q_offset,
        *offsets,
        scale=static.scale,
        softcap=static.softcap,
        static_offset=static.q_offset or 0,
    )
    blocks = static.blocks.fit(T)
    offset = static.q_offset if q_offset is None else q_offset
    y_BHTC, _ = forward.attention(
        q_BHTC,
        k_BKSC,
        v_BKSC,
        parts=parts,
        visits=forward_visits.make_visits(mask, T, S, blocks, offset),
        blocks=blocks,
        sinks_H=None if sinks_KG is None else sinks_KG.reshape(-1),
        interpret=static.is_interpreted,
    )
    return jnp.swapaxes(y_BHTC, 1, 2).reshape(B, T, K, G, -1)


def _offset(axes: str | Sequence[str] | None, size: int) -> jax.Array:
    """Returns where this device's part begins of a dimension cut over mesh axes."""
    if axes is None:
        return jnp.zeros((), jnp.int32)
    return jax.lax.axis_index(axes) * size


def _forward(static, *arrays: Any):
    return _attention(static, *arrays), arrays


def _backward(static, arrays, dy_BTKGC):
    *qkv, mask, bias, sinks_KG, dropout, q_offset = arrays

    def run(q_BTKGC, k_BSKC, v_BSKC, bias, sinks_KG):
        return chunked.attention(
            q_BTKGC,
            k_BSKC,
            v_BSKC,
            mask=mask,
            scale=static.scale,
            chunk=static.chunk,
            q_offset=static.q_offset if q_offset is None else q_offset,
            softcap=static.softcap,
            bias=bias,
            sinks_KG=sinks_KG,
            dropout=dropout,
        )

    dq, dk, dv, dbias, dsinks = jax.vjp(run, *qkv, bias, sinks_KG)[1](dy_BTKGC)
    zeros = (jax.tree.map(_no_gradient, x) for x in (mask, dropout, q_offset))
    dmask, ddropout, doffset = zeros
    return dq, dk, dv, dmask, dbias, dsinks, ddropout, doffset


def _no_gradient(x: jax.Array):
    """The cotangent of an integer."""
    return jnp.zeros(jnp.shape(x), jax.dtypes.float0)


_attention.defvjp(_forward, _backward)
