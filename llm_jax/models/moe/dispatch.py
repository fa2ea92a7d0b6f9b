"""Tokens to experts and back by matrix products: what all dispatches are held to, and those with a capacity.

`dense` runs every expert on every token and is what a routing means. `capacity` gives each expert a number
of places a row (GShard, Lepikhin et al. 2020, section 2.2); tokens that find none are passed on by the
residual alone. `soft` fills the places with mixtures of tokens (Soft MoE, Puigcerver et al. 2023). Experts
that lie on several devices are reached by moving places from where their row is to where their expert is:
an all-to-all, as the types say.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax import sharding
from llm_jax.models.moe import routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts:
    """The weights of feed-forward experts, in the compute dtype.

    Attributes:
      up_EDF, out_EFD: into and out of the feed-forward width.
      gate_EDF: of gated ones; else None.
      activation: between them.
    """

    up_EDF: jax.Array
    gate_EDF: jax.Array | None
    out_EFD: jax.Array
    activation: Callable = dataclasses.field(metadata={"static": True})

    def inner(self, product: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Returns what enters the last product, given how states are multiplied by a weight."""
        up = product(self.up_EDF)
        if self.gate_EDF is None:
            return self.activation(up)
        return self.activation(product(self.gate_EDF)) * up


def dense(
    x_BTD: jax.Array, routed: routing.Routing, experts: Experts, rules: sharding.AxisRules
) -> jax.Array:
    """Returns the weighted results of all experts, [B, T, D]: E / k times the work of the others."""
    spec_BTEF = _with(rules.act("BTF"), 2, None)
    inner = functools.partial(jnp.einsum, "BTD,EDF->BTEF", x_BTD, out_sharding=spec_BTEF)
    weights_BTE = jax.sharding.reshard(routed.weights_BTE(), _with(rules.act("BT"), 2, None))
    h_BTEF = experts.inner(inner) * weights_BTE[..., None].astype(x_BTD.dtype)
    return jnp.einsum("BTEF,EFD->BTD", h_BTEF, experts.out_EFD, out_sharding=rules.act("BTD"))


def capacity(
    x_BTD: jax.Array,
    routed: routing.Routing,
    experts: Experts,
    rules: sharding.AxisRules,
    size: int,
) -> jax.Array:
    """Returns the weighted results of the experts that had room for a token, [B, T, D].

    Args:
      x_BTD: states.
      routed: after `within_capacity` of the same size.
      experts: their weights.
      rules: of the model.
      size: X, the places of an expert in a row.
    """
    places_BTR = _places(routed)
    is_at_BTRX = places_BTR[..., None] == jnp.arange(size)
    is_of_BTRE = routed.experts_BTR[..., None] == jnp.arange(routed.num_experts)
    dtype = x_BTD.dtype
    # One term each: rounding to the compute dtype is of the weight alone.
    dispatch_BTEX = jnp.einsum(
        "BTRE,BTRX->BTEX", is_of_BTRE.astype(dtype), is_at_BTRX.astype(dtype)
    )
    weighted_BTRE = is_of_BTRE * routed.weights_BTR[..., None]
    combine_BTEX = jnp.einsum(
        "BTRE,BTRX->BTEX", weighted_BTRE, is_at_BTRX.astype(weighted_BTRE.dtype)
    )
    return mixed(x_BTD, dispatch_BTEX, combine_BTEX.astype(dtype), experts, rules)


def mixed(
    x_BTD: jax.Array,
    dispatch_BTEX: jax.Array,
    combine_BTEX: jax.Array,
    experts: Experts,
    rules: sharding.AxisRules,
) -> jax.Array:
    """Returns what experts make of mixtures of tokens, mixed again, [B, T, D].

    Args:
      x_BTD: states.
      dispatch_BTEX: of which tokens each place has how much.
      combine_BTEX: how much each token takes of each place.
      experts: their weights.
      rules: of the model.
    """
    batch, length = rules.act("BT")
    by_token = PartitionSpec(batch, length, None, None)
    dispatch_BTEX, combine_BTEX = (
        jax.sharding.reshard(x, by_token) for x in (dispatch_BTEX, combine_BTEX)
    )
    by_row = PartitionSpec(None, batch, None, None)
    expert, _, width = rules.act("EDF")
    rows = _remaining(batch, expert)
    z_EBXD = jnp.einsum("BTD,BTEX->EBXD", x_BTD, dispatch_BTEX, out_sharding=by_row)
    z_EBXD = jax.sharding.reshard(z_EBXD, PartitionSpec(expert, rows, None, None))
    inner = functools.partial(
        jnp.einsum,
        "EBXD,EDF->EBXF",
        z_EBXD,
        out_sharding=PartitionSpec(expert, rows, None, width),
    )
    y_EBXD = jnp.einsum(
        "EBXF,EFD->EBXD",
        experts.inner(inner),
        experts.out_EFD,
        out_sharding=PartitionSpec(expert, rows, None, None),
    )
    y_EBXD = jax.sharding.reshard(y_EBXD, by_row)
    return jnp.einsum("BTEX,EBXD->BTD", combine_BTEX, y_EBXD, out_sharding=rules.act("BTD"))


def within_capacity(routed: routing.Routing, size: int) -> routing.Routing:
    """Returns the routing without the slots that find their expert's `size` places of a row taken.

    First come the first choices of all tokens, in their order, then the second ones (GShard, algorithm 1).
    """
    return routed.without(_places(routed) >= size)


def _places(routed: routing.Routing) -> jax.Array:
    """Returns which place of its expert each slot has, int32 [B, T, R]; of unused slots, any."""
    is_of_BTRE = (routed.experts_BTR[..., None] == jnp.arange(routed.num_experts)).astype(jnp.int32)
    by_choice_BRE = jnp.sum(is_of_BTRE, axis=1)
    first_BRE = jnp.cumsum(by_choice_BRE, axis=1) - by_choice_BRE
    before_BTRE = jnp.cumsum(is_of_BTRE, axis=1) - is_of_BTRE
    return jnp.sum(is_of_BTRE * (first_BRE[:, None] + before_BTRE), axis=-1)


def _with(spec: PartitionSpec, index: int, axes) -> PartitionSpec:
    """Returns a spec with a dimension more."""
    return PartitionSpec(*spec[:index], axes, *spec[index:])


def _remaining(axes, used) -> tuple[str, ...] | None:
    """Returns the mesh axes of a dimension without those of another."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    others = (used,) if isinstance(used, str) else used or ()
    return tuple(name for name in names if name not in others) or None
