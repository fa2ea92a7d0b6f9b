"""Ring attention: keys travel from device to device, and results of parts are merged (Liu et al. 2023).

Of a sequence that is cut over n devices each holds two of 2n equal stretches, the i-th and the i-th from
the end ("zigzag", as in Dubey et al. 2024, section 3.3.2), so that a causal mask gives every device the
same work in every step: its own keys cost two stretches' worth of pairs, and so do those of any other
device, which are seen by the later stretch of queries alone or, one half of them, by both.

At step s device i attends to the keys of device i - s, while these travel on to the next. Results are
merged by their logsumexps. The backward pass is a second ring, in which the gradients of keys and values
travel with them and come home at the end. Nothing is gathered: a device holds its share of keys and
values, and those that have just arrived.

What a pair of stretches needs is mostly known beforehand: nothing, all pairs, or the mask; a table by
device and step tells which. Masks that are data are looked at as well, so that stretches which share no
document are left out.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import ad_checkpoint
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from llm_jax.kernels import placement
from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import chunked
from llm_jax.kernels.flash_attention import devices
from llm_jax.kernels.flash_attention import dropout as dropout_lib
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import pieces
from llm_jax.kernels.flash_attention import scores as scores_lib

# What a pair of stretches is: unseen, seen wherever its slots are, or to be looked at pair by pair.
SKIP, FREE, PART = 0, 1, 2

# Of a device, and of the keys that arrive.
_HALVES = (0, 1)


# --- the order of the sequence --------------------------------------------------------------------


def zigzag(x: jax.Array, axis: int = 1) -> jax.Array:
    """Returns an array whose sequence is cut over devices, with their stretches on each device.

    For what is small, tokens and the like: it is gathered on the way.
    """
    spec = jax.typeof(x).sharding.spec
    whole, n = _whole(x, axis)
    if n == 1:
        return x
    first, last = jnp.split(_in_parts(whole, axis, 2 * n), 2, axis)
    pairs = jnp.stack([first, jnp.flip(last, axis)], axis + 1)
    return jax.sharding.reshard(pairs.reshape(x.shape), spec)


def natural(x: jax.Array, axis: int = 1) -> jax.Array:
    """Returns an array in zigzag order gathered along its sequence, in the order of the text."""
    whole, n = _whole(x, axis)
    pairs = jnp.moveaxis(_in_parts(whole, axis, n, 2), axis + 1, 0)
    return jnp.concatenate([pairs[0], jnp.flip(pairs[1], axis)], axis).reshape(x.shape)


def _whole(x: jax.Array, axis: int) -> tuple[jax.Array, int]:
    """Returns an array gathered along a dimension, and over how many devices that was cut."""
    spec = (*jax.typeof(x).sharding.spec, *(None,) * x.ndim)[: x.ndim]
    n = placement.num_parts(spec[axis])
    if n == 1:
        return x, 1
    return jax.sharding.reshard(x, PartitionSpec(*spec[:axis], None, *spec[axis + 1 :])), n


def _in_parts(x: jax.Array, axis: int, *counts: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], *counts, -1, *x.shape[axis + 1 :])


def stretches(device: Any, num_devices: int) -> tuple[Any, Any]:
    """Returns the numbers of the stretches that a device holds, in their order there."""
    return device, 2 * num_devices - 1 - device


def schedule(mask: masks.Mask, num_devices: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many stretches queries are after keys, and what the pair is (SKIP, FREE, PART).

    Both are [device, step, stretch of queries, stretch of keys], the stretches by their order on a device.

    Args:
      length: of a stretch, in tokens.
    """
    device = np.arange(num_devices)[:, None]
    source = (device - np.arange(num_devices)) % num_devices
    q = np.stack(np.broadcast_arrays(*stretches(device, num_devices), source)[:2], -1)
    k = np.stack(stretches(source, num_devices), -1)
    distance = q[..., :, None] - k[..., None, :]
    kinds = np.zeros(distance.shape, np.int32)
    for far in np.unique(distance).tolist():
        kinds[distance == far] = _kind(mask, far, length)
    return distance, kinds


def _kind(mask: masks.Mask, far: int, length: int) -> int:
    if not masks.seen_blocks(mask, *(length,) * 4, far * length).any():
        return SKIP
    return PART if masks.depends_on_query_slots(_simplified(mask, far, length)) else FREE


def _simplified(mask: masks.Mask, far: int, length: int) -> masks.Mask:
    """Returns what matters of a mask for queries that many stretches after the keys."""
    first = far * length
    return mask.within(masks.Interval(first, first + length - 1), masks.Interval(0, length - 1))


# --- the operation --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Static:
    scale: float
    softcap: float | None
    piece: pieces.Piece
    chunk: int


def attention(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    mask: masks.Mask,
    scale: float,
    piece: pieces.Piece,
    chunk: int,
    q_offset: jax.Array | int = 0,
    softcap: float | None = None,
    bias: biases.Bias | None = None,
    sinks_KG: jax.Array | None = None,
    dropout: dropout_lib.Dropout | None = None,
) -> jax.Array:
    """As `reference.attention`, of a sequence that is cut over devices and in zigzag order.

    Queries, keys, values and what the mask has for each of them are in the order of `zigzag`; slots and
    distances are those of the text, and so are the draws of dropout.

    Args:
      piece: what attends on a device.
      chunk: queries at a time where the gradient of slopes is asked for and `piece` has none: that one
        gathers.

    Raises:
      ValueError: lengths or a bias that do not go around.
    """
    T, S, n = (
        q_BTKGC.shape[1],
        k_BSKC.shape[1],
        placement.num_parts(devices.axes_of(q_BTKGC).length),
    )
    if T != S or T % (2 * n) or not isinstance(q_offset, int) or q_offset != 0:
        raise ValueError(
            f"ring attention takes as many queries as keys, in 2 * {n} equal stretches, from slot 0 on; got"
            f" {T} queries from slot {q_offset} on and {S} keys; use mesh.context = 'gather'"
        )
    if isinstance(bias, biases.Full):
        raise ValueError(
            "ring attention takes biases by distance; an array [B,K,G,T,S] ="
            f" {bias.bias_BKGTS.shape} is as large as all scores; use mesh.context = 'gather'"
        )
    static = _Static(scale, softcap, piece, chunk)
    return _attention(static, q_BTKGC, k_BSKC, v_BSKC, mask, bias, sinks_KG, dropout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, *arrays):
    return _forward(static, *arrays)[0]


def _forward(static, *arrays):
    """Returns the result, and what the backward pass needs, under names that remat can keep."""
    local = functools.partial(_forward_on_one_device, static)
    y_BTKGC, lse_BKGT = devices.on_each(local, ("BTKGC", "BKGT"), arrays, is_ring=True)
    y_BTKGC = ad_checkpoint.checkpoint_name(y_BTKGC, "attention_output")
    lse_BKGT = ad_checkpoint.checkpoint_name(lse_BKGT, "attention_logsumexp")
    return y_BTKGC, (arrays, y_BTKGC, lse_BKGT)


def _backward(static, residuals, dy_BTKGC):
    arrays, y_BTKGC, lse_BKGT = residuals
    _, _, _, mask, bias, sinks_KG, dropout = arrays
    delta_BTKG = jnp.sum(dy_BTKGC.astype(jnp.float32) * y_BTKGC.astype(jnp.float32), -1)
    delta_BKGT = jnp.moveaxis(delta_BTKG, 1, 3)
    more = ("BTKGC", dy_BTKGC), ("BKGT", lse_BKGT), ("BKGT", delta_BKGT)
    outs = ["BTKGC", "BSKC", "BSKC"]
    if static.piece.has_gradient(bias):
        outs.append("KGU" if isinstance(bias, biases.Relative) else "KG")
    local = functools.partial(_backward_on_one_device, static)
    dq, dk, dv, *made = devices.on_each(local, outs, arrays, more, is_ring=True)
    if made:
        dbias = jax.tree.unflatten(jax.tree.structure(bias), made)
    else:
        dbias = _bias_gradient(static, arrays, dy_BTKGC)
    dsinks = None
    if sinks_KG is not None:
        weights_BKGT = jnp.exp(sinks_KG[..., None] - lse_BKGT)
        dsinks = -jnp.sum(weights_BKGT * delta_BKGT, axis=(0, 3)).astype(sinks_KG.dtype)
    return dq, dk, dv, devices.no_gradient(mask), dbias, dsinks, devices.no_gradient(dropout)


def _bias_gradient(static, arrays, dy_BTKGC):
    """Returns the gradient of slopes. Where nobody asks for it the compiler leaves all of it out."""
    *qkv, mask, bias, sinks_KG, dropout = arrays
    if bias is None:
        return None
    qkv = [natural(x) for x in qkv]
    mask = masks.map_arrays(lambda dims, x: x if dims == "B" else natural(x), mask)

    def run(bias):
        how = {"scale": static.scale, "softcap": static.softcap, "chunk": static.chunk}
        how |= {"mask": mask, "bias": bias, "sinks_KG": sinks_KG, "dropout": dropout}
        return chunked.attention(*qkv, **how)

    return jax.vjp(run, bias)[1](natural(dy_BTKGC))[0]


_attention.defvjp(_forward, _backward)


# --- one device -----------------------------------------------------------------------------------


class _Ring:
    """What a device knows of the ring: where it is, and what to do with the keys that arrive."""

    def __init__(self, static: _Static, axes: devices.Axes, q_BTKGC, mask, bias, dropout):
        self.static, self.axes = static, axes
        self.q_BTKGC, self.bias, self.dropout = q_BTKGC, bias, dropout
        self.num_devices = placement.num_parts(axes.length)
        self.device = jax.lax.axis_index(axes.length)
        self.length = q_BTKGC.shape[1] // 2
        self.distance, self.kinds = schedule(mask, self.num_devices, self.length)

    def half(self, x: jax.Array, number: int, axis: int = 1) -> jax.Array:
        """Returns one of the two stretches of a device's array."""
        return jax.lax.slice_in_dim(x, number * self.length, (number + 1) * self.length, axis=axis)

    def passed_on(self, tree: Any) -> Any:
        """Returns what the device before has, as this one's goes to the next."""
        to_next = [(i, (i + 1) % self.num_devices) for i in range(self.num_devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes.length, to_next), tree)

    def keys_passed_on(self, keys: tuple) -> tuple:
        """As `passed_on`, for keys, values and the mask that holds what belongs to them."""
        k_BSKC, v_BSKC, mask = keys
        mask = masks.map_arrays(lambda dims, x: self.passed_on(x) if dims == "BS" else x, mask)
        return *self.passed_on((k_BSKC, v_BSKC)), mask

    def visit(
        self, mask: masks.Mask, a: int, b: int, step: Any, run: Callable[..., Any], before: Any
    ) -> Any:
        """Returns `run(parts, before)` for a pair of stretches, or `before` where nothing is seen.

        Args:
          mask: with what belongs to the keys that have arrived.
          a, b: of queries and keys.
          step: an integer for a device's own keys; those of others come by a traced one.
        """
        steps = slice(0, 1) if isinstance(step, int) else slice(1, None)
        distance, kinds = (x[:, steps, a, b] for x in (self.distance, self.kinds))
        found = sorted({*kinds.flat} | ({SKIP} if jax.tree.leaves(mask) else set()))
        if found == [SKIP]:
            return before
        at = self.device, step - steps.start
        far = int(distance.flat[0])
        if (distance != far).any():
            far = jnp.asarray(distance)[at]
        q_offset = far * self.length
        first = stretches(self.device, self.num_devices)[a] * self.length
        mask = masks.moved(mask, first - q_offset)
        mask = masks.cut(mask, *(slice(n * self.length, (n + 1) * self.length) for n in (a, b)))
        index = jnp.asarray(np.searchsorted(found, kinds))[at]
        if jax.tree.leaves(mask):
            some = masks.block_bounds(mask, *(self.length,) * 4, q_offset).some
            index = jnp.where(jnp.any(some), index, 0)
        branches = []
        for kind in found:
            if kind == SKIP:
                branches.append(lambda before: before)
                continue
            simple, offset = mask, q_offset
            if kind == FREE:
                simple = _simplified(mask, int(distance[kinds == FREE][0]), self.length)
                offset = q_offset if self.bias is not None else 0
            parts = self._parts(simple, offset, first, first - q_offset)
            branches.append(functools.partial(run, parts))
        return (
            branches[0](before) if len(branches) == 1 else jax.lax.switch(index, branches, before)
        )

    def _parts(self, mask, offset, query, key) -> scores_lib.Parts:
        origin = None
        if self.dropout is not None:
            origin = devices.origin(self.axes, self.q_BTKGC, query, key)
        is_known = isinstance(offset, int)
        return scores_lib.Parts(
            mask,
            self.bias,
            self.dropout,
            None if is_known else offset,
            origin,
            scale=self.static.scale,
            softcap=self.static.softcap,
            static_offset=offset if is_known else 0,
        )


def _forward_on_one_device(
    static, axes, q_BTKGC, k_BSKC, v_BSKC, mask, bias, sinks_KG, dropout
) -> tuple[jax.Array, jax.Array]:
    ring = _Ring(static, axes, q_BTKGC, mask, bias, dropout)
    B, _, K, G, _ = q_BTKGC.shape

    def visit(sums, keys, step):
        k_BSKC, v_BSKC, mask = keys
        sums = list(sums)
        for a in _HALVES:
            for b in _HALVES:

                def run(parts, before, a=a, b=b):
                    one_q, one_k, one_v = (
                        ring.half(q_BTKGC, a),
                        *(ring.half(x, b) for x in keys[:2]),
                    )
                    return _merged(before, static.piece.forward(one_q, one_k, one_v, parts))

                sums[a] = ring.visit(mask, a, b, step, run, sums[a])
        return tuple(sums)

    # A sink is a key that every query has seen, whose value is zero.
    lse_KG = jnp.full((K, G), scores_lib.EMPTY, jnp.float32) if sinks_KG is None else sinks_KG
    lse_BKGT = jnp.broadcast_to(lse_KG.astype(jnp.float32)[..., None], (B, K, G, ring.length))
    y_BTKGC = jnp.zeros((B, ring.length, K, G, v_BSKC.shape[-1]), jnp.float32)
    keys = k_BSKC, v_BSKC, mask
    arriving = ring.keys_passed_on(keys)
    sums = visit(((y_BTKGC, lse_BKGT),) * 2, keys, 0)

    def body(carry, step):
        keys, sums = carry
        return (ring.keys_passed_on(keys), visit(sums, keys, step)), None

    steps = np.arange(1, ring.num_devices, dtype=np.int32)
    (_, sums), _ = jax.lax.scan(body, (arriving, sums), steps)
    ys_BTKGC, lses_BKGT = zip(*sums)
    return jnp.concatenate(ys_BTKGC, 1).astype(q_BTKGC.dtype), jnp.concatenate(lses_BKGT, 3)


def _merged(one: tuple, other: tuple) -> tuple[jax.Array, jax.Array]:
    """Returns result and logsumexp of the keys of both (Dao 2023, section 3.1)."""
    (y_BTKGC, lse_BKGT), (more_BTKGC, more_BKGT) = one, other
    top_BKGT = jnp.maximum(lse_BKGT, more_BKGT)
    shares = [jnp.exp(x - top_BKGT) for x in (lse_BKGT, more_BKGT)]
    total_BKGT = shares[0] + shares[1]
    share, more = (jnp.moveaxis(x / total_BKGT, 3, 1)[..., None] for x in shares)
    return share * y_BTKGC + more * more_BTKGC, top_BKGT + jnp.log(total_BKGT)


def _backward_on_one_device(static, axes, *arrays):
    q_BTKGC, k_BSKC, v_BSKC, mask, bias, _, dropout = arrays[:7]  # the logsumexp holds the sinks
    dy_BTKGC, lse_BKGT, delta_BKGT = arrays[7:]
    ring = _Ring(static, axes, q_BTKGC, mask, bias, dropout)

    def zeros(x):
        return (jnp.zeros((x.shape[0], ring.length, *x.shape[2:]), jnp.float32),) * 2

    def visit(dqs, dbias, keys, step):
        """Returns the sums with those of these keys, and the gradients of the keys from these queries."""
        k_BSKC, v_BSKC, mask = keys
        dqs, dkvs = list(dqs), list(zip(zeros(k_BSKC), zeros(v_BSKC)))
        for a in _HALVES:
            of_queries = [ring.half(dy_BTKGC, a)]
            of_queries += [ring.half(x, a, axis=3) for x in (lse_BKGT, delta_BKGT)]
            for b in _HALVES:

                def run(parts, before, a=a, b=b, of_queries=of_queries):
                    arrays = ring.half(q_BTKGC, a), *(ring.half(x, b) for x in keys[:2])
                    dq, dk, dv, dbias = static.piece.backward(*arrays, *of_queries, parts)
                    found = dq, (dk, dv), dbias if before[2] is not None else None
                    return jax.tree.map(lambda x, y: x + y.astype(jnp.float32), before, found)

                before = dqs[a], dkvs[b], dbias
                dqs[a], dkvs[b], dbias = ring.visit(mask, a, b, step, run, before)
        return tuple(dqs), dbias, tuple(dkvs)

    dbias = None
    if static.piece.has_gradient(bias):
        dbias = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), bias)
    keys = k_BSKC, v_BSKC, mask
    arriving = ring.keys_passed_on(keys)
    dqs, dbias, dkvs = visit(zeros(q_BTKGC), dbias, keys, 0)

    def body(carry, step):
        keys, dkvs, dqs, dbias = carry
        # What comes along was made elsewhere while these keys were here before: it waits for nothing here.
        arriving, before = ring.keys_passed_on(keys), ring.passed_on(dkvs)
        dqs, dbias, dkvs = visit(dqs, dbias, keys, step)
        return (arriving, jax.tree.map(jnp.add, before, dkvs), dqs, dbias), None

    steps = np.arange(1, ring.num_devices, dtype=np.int32)
    (_, dkvs, dqs, dbias), _ = jax.lax.scan(body, (arriving, dkvs, dqs, dbias), steps)
    dkvs = ring.passed_on(dkvs)  # home
    dk, dv = (_summed(jnp.concatenate(x, 1), axes.g) for x in zip(*dkvs))  # of all groups
    found = jnp.concatenate(dqs, 1).astype(q_BTKGC.dtype)
    found = found, dk.astype(k_BSKC.dtype), dv.astype(v_BSKC.dtype)
    if dbias is None:
        return found
    ((array, of),) = zip(*map(jax.tree.leaves, (dbias, bias)))
    return *found, _summed(array, axes.row, axes.length).astype(of.dtype)


def _summed(x: jax.Array, *axes: placement.Axes) -> jax.Array:
    for names in axes:
        if placement.is_cut(names):
            x = jax.lax.psum(x, names)
    return x
