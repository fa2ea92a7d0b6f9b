"""Routers that share the tokens of a row out evenly. All tokens of the row decide together.

What a token gets depends on those after it, so a decoder that is trained so sees the future: for expert
choice that is refused by the config; Sinkhorn and BASE balance in training alone, and the weights, which
are all that a loss has a gradient in, are of the token's own scores.
"""

import jax
import jax.numpy as jnp

from llm_jax.models.moe import routers
from llm_jax.models.moe import routing

# BASE: a bid is at least so much higher than the price, of scores in [0, 1]; so far may it be from the best.
_RAISE = 1e-2
_FAR = -1e9


def room_of_expert(num_tokens: int, num_experts: int, k: int, factor: float = 1.0) -> int:
    """Returns X, the tokens of a row that each expert takes, of `num_tokens` with k experts each."""
    even = -(-num_tokens * k * factor // num_experts)
    return int(min(max(even, 1), num_tokens))


def expert_choice(
    logits_BTE: jax.Array, is_token_BT: jax.Array, k: int, factor: float = 1.0
) -> routing.Routing:
    """Each expert takes the tokens that score highest with it (Zhou et al. 2022, section 3.2).

    A token gets any number of experts, k on average; weights are those of its softmax over experts.

    Args:
      logits_BTE: float32.
      is_token_BT: whether there is a token; others are never taken.
      k: experts of a token on average.
      factor: of the even share of tokens, what an expert takes (their capacity factor is k times this).
    """
    _, num_tokens, num_experts = logits_BTE.shape
    size = room_of_expert(num_tokens, num_experts, k, factor)
    scores_BTE = jax.nn.softmax(logits_BTE)
    by_BET = jnp.swapaxes(jnp.where(is_token_BT[..., None], scores_BTE, -1.0), 1, 2)
    taken_BEX = jax.lax.top_k(jax.lax.stop_gradient(by_BET), size)[1]
    is_taken_BET = jnp.any(taken_BEX[..., None] == jnp.arange(num_tokens), axis=2)
    is_taken_BTE = jnp.swapaxes(is_taken_BET, 1, 2) & is_token_BT[..., None]
    return routing.of_mask(is_taken_BTE, scores_BTE, scores_BTE, room=num_experts * size)


def sinkhorn(
    logits_BTE: jax.Array,
    is_token_BT: jax.Array,
    k: int,
    *,
    iterations: int,
    is_normalised: bool,
    scale: float = 1.0,
) -> routing.Routing:
    """The k largest of a plan that gives each expert the same mass (Clark et al. 2022, appendix B).

    The plan is the entropic transport between tokens and experts, by alternately dividing rows and
    columns of exp(logits). Weights are of the softmax, as without it.

    Args:
      logits_BTE: float32.
      is_token_BT: whether there is a token.
      k: experts of a token.
      iterations: of the division.
      is_normalised: whether the chosen weights sum to 1.
      scale: multiplies the weights.
    """
    is_token_BT1 = is_token_BT[..., None]
    log_BTE = jax.lax.stop_gradient(jax.nn.log_softmax(logits_BTE))
    # Nothing is left of a row without tokens but padding, which must not be divided by.
    log_BTE = jnp.where(is_token_BT1, log_BTE, _FAR)

    def divide(_, log_BTE):
        log_BTE = log_BTE - jax.nn.logsumexp(log_BTE, axis=1, keepdims=True)
        return jnp.where(is_token_BT1, jax.nn.log_softmax(log_BTE), _FAR)

    plan_BTE = jax.lax.fori_loop(0, iterations, divide, log_BTE)
    scores_BTE = jax.nn.softmax(logits_BTE)
    return routers.chosen(scores_BTE, scores_BTE, plan_BTE, k, is_normalised, scale)


def base(logits_BTE: jax.Array, is_token_BT: jax.Array) -> routing.Routing:
    """Each expert takes as many tokens as any other, so that scores sum up highest (BASE, Lewis et al. 2021).

    By an auction (Bertsekas 1992, section 4): tokens that have no place bid for the expert that is worth
    most to them at its price, and each expert keeps its highest bids. The sum is within T times the
    smallest raise of the best. A token has one expert, weighted by a sigmoid of its logit.

    Args:
      logits_BTE: float32.
      is_token_BT: whether there is a token; others take the places that are left.
    """
    _, num_tokens, num_experts = logits_BTE.shape
    size = -(-num_tokens // num_experts)
    values_BTE = jax.lax.stop_gradient(jax.nn.sigmoid(logits_BTE))
    values_BTE = jnp.where(is_token_BT[..., None], values_BTE, 0.0)
    experts_BT = jax.vmap(lambda values_TE: _auction(values_TE, size))(values_BTE)
    weights_BT1 = routing.at(jax.nn.sigmoid(logits_BTE), experts_BT[..., None])
    scores_BTE = jax.nn.softmax(logits_BTE)
    return routing.of_chosen(experts_BT[..., None], weights_BT1, scores_BTE)


def greedy(logits_BTE: jax.Array) -> routing.Routing:
    """The best expert of each token, weighted as by `base`: what a model so trained is used with."""
    experts_BT1 = jnp.argmax(logits_BTE, axis=-1)[..., None]
    weights_BT1 = routing.at(jax.nn.sigmoid(logits_BTE), experts_BT1)
    return routing.of_chosen(experts_BT1, weights_BT1, jax.nn.softmax(logits_BTE))


def _auction(values_TE: jax.Array, size: int) -> jax.Array:
    """Returns an expert for each token, int32 [T], at most `size` tokens for each."""
    T, E = values_TE.shape
    ids_E = jnp.arange(E)

    def is_going(state):
        experts_T, _ = state
        return jnp.any(experts_T == E)

    def bid(state):
        experts_T, bids_T = state
        is_held_TE = experts_T[:, None] == ids_E
        held_TE = jnp.where(is_held_TE, bids_T[:, None], _FAR)
        # The price of a full expert is the lowest bid that it holds; places that are free cost nothing.
        is_full_E = jnp.sum(is_held_TE, axis=0) >= size
        lowest_E = jnp.min(jnp.where(is_held_TE, bids_T[:, None], jnp.inf), axis=0)
        prices_E = jnp.where(is_full_E, lowest_E, 0.0)
        gains_TE = values_TE - prices_E
        (best_T, second_T), (wanted_T, _) = (x.T for x in jax.lax.top_k(gains_TE, 2))
        is_wanted_TE = wanted_T[:, None] == ids_E
        prices_T = jnp.sum(jnp.where(is_wanted_TE, prices_E, 0.0), axis=1)
        raised_T = prices_T + best_T - second_T + _RAISE
        is_wanted_TE &= (experts_T == E)[:, None]
        all_TE = jnp.where(is_wanted_TE, raised_T[:, None], held_TE)
        # Ties go to the first token: exactly `size` at the most stay.
        kept_TE = _largest(all_TE, size) & (all_TE > _FAR)
        experts_T = jnp.where(jnp.any(kept_TE, axis=1), jnp.argmax(kept_TE, axis=1), E)
        bids_T = jnp.max(jnp.where(kept_TE, all_TE, _FAR), axis=1)
        return experts_T.astype(jnp.int32), bids_T

    start = jnp.full((T,), E, jnp.int32), jnp.full((T,), _FAR)
    return jax.lax.while_loop(is_going, bid, start)[0]


def _largest(bids_TE: jax.Array, size: int) -> jax.Array:
    """Returns whether a bid is among the `size` largest of its expert."""
    order_EX = jax.lax.top_k(bids_TE.T, size)[1]
    return jnp.any(order_EX[..., None] == jnp.arange(bids_TE.shape[0]), axis=1).T
