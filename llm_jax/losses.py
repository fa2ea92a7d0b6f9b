"""Next-token cross-entropy and its companions, as sums that batches can be added up from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossSums(NamedTuple):
    """Weighted sums over tokens, float32 scalars. Divide by `weight` for means.

    Attributes:
      cross_entropy: of targets, in nats.
      z_squared: logsumexp(logits)^2, the z-loss before its coefficient.
      weight: of the tokens counted.
    """

    cross_entropy: jax.Array
    z_squared: jax.Array
    weight: jax.Array


def next_token_terms(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy of `targets_BT`, in nats, and the logsumexp of each token's logits.

    Args:
      logits_BTV: float32; the vocabulary may be sharded.
      targets_BT: int32 ids.
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A masked sum instead of a gather: it works on each shard of the vocabulary where it lies.
    is_target_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    target_logit_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    return log_z_BT - target_logit_BT, log_z_BT


def weighted_sums(
    cross_entropy_BT: jax.Array, log_z_BT: jax.Array, weights_BT: jax.Array
) -> LossSums:
    """Sums the terms of tokens; weights are float32, 0 where a token does not count.

    The z-loss is that of Chowdhery et al. 2022 (PaLM, section 5).
    """
    return LossSums(
        cross_entropy=jnp.sum(cross_entropy_BT * weights_BT),
        z_squared=jnp.sum(jnp.square(log_z_BT) * weights_BT),
        weight=jnp.sum(weights_BT),
    )


def next_token_sums(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> LossSums:
    """Sums the loss of predicting `targets_BT` from float32 logits over all tokens."""
    return weighted_sums(*next_token_terms(logits_BTV, targets_BT), weights_BT)
