"""Cross-entropy by its definition: all logits at once."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax import losses


def cross_entropy(
    x_BTD: jax.Array,
    head: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    head_dims: str,
    softcap: float | None,
    z_loss: float,
    bias_V: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the objective, cross-entropies and logsumexps, as `op.cross_entropy` defines them."""
    spec = None
    if not jax.sharding.get_abstract_mesh().empty:
        x_spec, head_spec = jax.typeof(x_BTD).sharding.spec, jax.typeof(head).sharding.spec
        spec = PartitionSpec(*x_spec[:2], head_spec[head_dims.index("V")])
    logits_BTV = jnp.einsum(
        f"BTD,{head_dims}->BTV",
        x_BTD,
        head.astype(x_BTD.dtype),
        out_sharding=spec,
    ).astype(jnp.float32)
    if bias_V is not None:
        logits_BTV = logits_BTV + bias_V.astype(jnp.float32)
    if softcap is not None:
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
    cross_entropy_BT, log_z_BT = losses.next_token_terms(logits_BTV, targets_BT)
    objective = jnp.sum(weights_BT * (cross_entropy_BT + z_loss * jnp.square(log_z_BT)))
    return objective, cross_entropy_BT, log_z_BT
