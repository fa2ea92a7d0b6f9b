"""Cross-entropy of tokens and of labels, as sums that batches can be added up from."""

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


def label_terms(
    head: str, logits: jax.Array, targets: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """Returns the loss of each label: the cross-entropy in nats, or a squared error.

    Args:
      head: as `config.model.head`. `sequence`: logits [B, Y], targets [B], losses [B]; of a single
        logit, a regression (float32 targets). `token`: [B, T, Y], [B, T] and [B, T]. `span`: [B, T, 2]
        of the first and the last token of an answer, [B, 2] and [B], the mean of both (Devlin et al.
        2019, section 4.2).
      logits, targets: float32, and int32 but for regression.
      segments_BT: int32; no answer begins or ends where it is 0.
    """
    if head == "sequence" and logits.shape[-1] == 1:
        return jnp.square(logits[:, 0] - targets)
    if head == "span":
        is_text_BT1 = (segments_BT > 0)[..., None]
        # Far below any logit, and small enough that a row without text has a finite loss, as its
        # weight of 0 must have something to multiply.
        logits_BT2 = jnp.where(is_text_BT1, logits, -1e30)
        log_z_B2 = jax.nn.logsumexp(logits_BT2, axis=1)
        is_target_BT2 = jnp.arange(logits.shape[1])[None, :, None] == targets[:, None, :]
        return jnp.mean(log_z_B2 - jnp.sum(jnp.where(is_target_BT2, logits, 0.0), axis=1), axis=-1)
    return next_token_terms(logits, targets)[0]


def contrastive_sums(
    first_BD: jax.Array,
    second_BD: jax.Array,
    weights_B: jax.Array,
    *,
    temperature: float,
    is_symmetric: bool,
) -> LossSums:
    """Sums the loss of finding each text's partner among the partners of all, in nats.

    The cross-entropy of a softmax over cosines (InfoNCE; van den Oord et al. 2018, section 2.3), with the
    other pairs of the batch, on whichever device, as what is wrong (Henderson et al. 2017, section 4.4).

    Args:
      first_BD, second_BD: float32 vectors of unit length of the two texts of each pair.
      weights_B: float32, 0 for pairs that are padding: they are nobody's candidates either.
      temperature: that cosines are divided by.
      is_symmetric: whether the mean is taken with the loss of finding the first of the second.
    """
    rows = jax.typeof(weights_B).sharding.spec
    numbers_B = jax.sharding.reshard(jnp.arange(weights_B.shape[0]), rows)
    weights_S = jax.sharding.reshard(weights_B, jax.P(None))

    def terms_B(own_BD, others_BD):
        others_SD = jax.sharding.reshard(others_BD, jax.P(None, None))
        cosines_BS = jnp.einsum("BD,SD->BS", own_BD, others_SD, precision="highest")
        logits_BS = jnp.where(weights_S > 0, cosines_BS / temperature, -1e30)
        return next_token_terms(logits_BS, numbers_B)[0]

    terms = terms_B(first_BD, second_BD)
    if is_symmetric:
        terms = (terms + terms_B(second_BD, first_BD)) / 2
    # A row of padding has no candidate of its own: its term is beyond counting, and must not be.
    terms = jnp.where(weights_B > 0, terms, 0.0)
    return weighted_sums(terms, jnp.zeros_like(terms), weights_B)


def preference_sums(
    policy_B2: jax.Array, reference_B2: jax.Array, weights_B: jax.Array, *, beta: float
) -> LossSums:
    """Sums the loss of preferring the first of two answers, in nats (Rafailov et al. 2023, equation 7).

    Args:
      policy_B2, reference_B2: log-probabilities of both answers under the model that learns and under the one it
        started from.
      weights_B: float32, 0 for rows that are padding.
      beta: how dear it is to leave the reference.
    """
    gained_B2 = policy_B2 - reference_B2
    terms_B = -jax.nn.log_sigmoid(beta * (gained_B2[:, 0] - gained_B2[:, 1]))
    return weighted_sums(terms_B, jnp.zeros_like(terms_B), weights_B)


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
