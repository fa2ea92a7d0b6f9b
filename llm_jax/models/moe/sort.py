"""Dropless dispatch: slots sorted by expert, so that each expert multiplies the rows that are its own.

MegaBlocks' idea (Gale et al. 2022): nothing is padded to a capacity and nothing dropped. All of it is local
to a device, between `jax.shard_map`; where experts lie on several, `exchange` brings rows there and back.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax import sharding
from llm_jax.kernels import placement
from llm_jax.kernels.grouped_matmul import op as grouped
from llm_jax.models.moe import dispatch
from llm_jax.models.moe import exchange
from llm_jax.models.moe import routing


def sorted_by_expert(
    x_BTD: jax.Array,
    routed: routing.Routing,
    experts: dispatch.Experts,
    rules: sharding.AxisRules,
    buffer_factor: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted results of each token's experts, [B, T, D], and how many slots were dropped.

    Args:
      x_BTD: states.
      routed: of these tokens.
      experts: their weights, cut over devices by expert and by feed-forward width at the most.
      rules: of the model.
      buffer_factor: rows that a device has room for from all others, over those it has itself; None: as
        many as there may be, and nothing is dropped.
    """
    batch, length = rules.act("BT")
    expert, _, width = rules.act("EDF")
    by_token = PartitionSpec(batch, length, None)
    into, out = PartitionSpec(expert, None, width), PartitionSpec(expert, width, None)
    num_rows = x_BTD.shape[0] // placement.num_parts(batch)
    local = functools.partial(
        _local,
        num_experts=routed.num_experts,
        room=routed.room * num_rows,
        activation=experts.activation,
        expert_axis=expert if placement.is_cut(expert) else None,
        width_axes=_names(width),
        buffer_factor=buffer_factor,
    )
    of_tokens, of_weights = _names(batch, length), _names(expert, width)
    arrays = (x_BTD, routed.experts_BTR, routed.weights_BTR)
    tokens = [jax.sharding.reshard(x, by_token) for x in arrays]
    weights = (experts.up_EDF, experts.gate_EDF, experts.out_EFD)
    specs = (into, None if experts.gate_EDF is None else into, out)
    y_BTD, dropped = jax.shard_map(
        functools.partial(local, of_tokens=of_tokens, of_weights=of_weights),
        in_specs=(by_token, by_token, by_token, specs),
        out_specs=(by_token, PartitionSpec()),
    )(*tokens, weights)
    return y_BTD, dropped


def _local(
    x_BTD: jax.Array,
    experts_BTR: jax.Array,
    weights_BTR: jax.Array,
    weights: tuple[jax.Array, jax.Array | None, jax.Array],
    *,
    num_experts: int,
    room: int,
    activation: Callable,
    expert_axis: str | None,
    width_axes: tuple[str, ...],
    buffer_factor: float | None,
    of_tokens: tuple[str, ...],
    of_weights: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """What each device does with its tokens, which differ along some axes, and weights, along others."""
    B, T, D = x_BTD.shape
    num_slots = experts_BTR.shape[2]
    # Gradients of what devices share are summed where it enters, and nowhere else.
    axes = _names(of_tokens, of_weights)
    x_BTD, weights_BTR, experts_BTR = (
        _varying(x, of_tokens, axes) for x in (x_BTD, weights_BTR, experts_BTR)
    )
    weights = jax.tree.map(lambda x: _varying(x, of_weights, axes), weights)
    x_ND, ids = x_BTD.reshape(B * T, D), experts_BTR.reshape(-1)
    sizes_E = jnp.sum(ids[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    order = jnp.argsort(ids)
    inverse_NR = jnp.argsort(order).reshape(-1, num_slots)
    # Where only some slots can be used, the others must not be made room for on the way back either.
    is_sparse = room < len(order)
    order = order[:room]
    if is_sparse:
        rows_RD = x_ND[order // num_slots]
    else:
        rows_RD = _rows_of_tokens(x_ND, order, inverse_NR)
    run = functools.partial(_run, weights, activation)
    dropped = jnp.zeros((), jnp.float32)
    if expert_axis is None:
        y_RD = run(rows_RD, sizes_E)
    else:
        y_RD, dropped = exchange.elsewhere(rows_RD, sizes_E, run, expert_axis, buffer_factor, axes)
    if is_sparse:
        weights_R1 = weights_BTR.reshape(-1, 1)[order]
        y_ND = jnp.zeros_like(x_ND, jnp.float32).at[order // num_slots].add(y_RD * weights_R1)
    else:
        y_NRD = _tokens_of_rows(y_RD, order, inverse_NR)
        weights_NR1 = weights_BTR.reshape(B * T, num_slots, 1)
        y_ND = jnp.sum(y_NRD.astype(jnp.float32) * weights_NR1, axis=1)
    y_ND = y_ND.astype(x_ND.dtype)
    if width_axes:
        y_ND = jax.lax.psum(y_ND, width_axes)
    if expert_axis is not None:
        # Devices that share tokens have counted the same ones.
        dropped = jax.lax.psum(dropped, axes) / placement.num_parts(width_axes)
    return y_ND.reshape(B, T, D), dropped


def _run(
    weights: tuple[jax.Array, jax.Array | None, jax.Array],
    activation: Callable,
    rows_RD: jax.Array,
    sizes_E: jax.Array,
) -> jax.Array:
    """Returns what experts make of rows that are sorted by them."""
    up_EDF, gate_EDF, out_EFD = weights
    experts = dispatch.Experts(up_EDF, gate_EDF, out_EFD, activation)
    h_RF = experts.inner(lambda weight_EDF: grouped.grouped_matmul(rows_RD, weight_EDF, sizes_E))
    return grouped.grouped_matmul(h_RF, out_EFD, sizes_E)


def _varying(x: jax.Array, known: tuple[str, ...], axes: tuple[str, ...]) -> jax.Array:
    """Returns what differs along `known` axes as what may differ along all of them."""
    missing = tuple(name for name in axes if name not in known)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _names(*of_dims: placement.Axes) -> tuple[str, ...]:
    """Returns the axes of some dimensions, each once."""
    names = [(axes,) if isinstance(axes, str) else axes or () for axes in of_dims]
    return tuple(dict.fromkeys(name for of_dim in names for name in of_dim))


# Tokens to sorted rows and back. The gradient of one is the other: written out, as that of a gather would be
# a scatter, which adds row by row.


@jax.custom_vjp
def _rows_of_tokens(x_ND: jax.Array, order: jax.Array, inverse_NR: jax.Array) -> jax.Array:
    """Returns the token of each sorted slot, [R, D]; `order` are slots, numbered token by token."""
    return x_ND[order // inverse_NR.shape[1]]


def _rows_forward(x_ND, order, inverse_NR):
    return _rows_of_tokens(x_ND, order, inverse_NR), (order, inverse_NR)


def _rows_backward(residuals, d_RD):
    order, inverse_NR = residuals
    d_NRD = _tokens_of_rows(d_RD, order, inverse_NR)
    return jnp.sum(d_NRD.astype(jnp.float32), axis=1).astype(d_RD.dtype), None, None


@jax.custom_vjp
def _tokens_of_rows(y_RD: jax.Array, order: jax.Array, inverse_NR: jax.Array) -> jax.Array:
    """Returns the row of each token's slots, [N, R, D], zeros for those that are not among the rows."""
    return y_RD.at[inverse_NR].get(mode="fill", fill_value=0)


def _tokens_forward(y_RD, order, inverse_NR):
    return _tokens_of_rows(y_RD, order, inverse_NR), (order, inverse_NR)


def _tokens_backward(residuals, d_NRD):
    order, _ = residuals
    return d_NRD.reshape(-1, d_NRD.shape[-1])[order], None, None


_rows_of_tokens.defvjp(_rows_forward, _rows_backward)
_tokens_of_rows.defvjp(_tokens_forward, _tokens_backward)
