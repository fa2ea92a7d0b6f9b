"""Routers of which each token chooses for itself: pure functions of logits.

All take float32 logits of a router, [B, T, E], and give a `routing.Routing`. No token's experts depend on
another token, so a decoder may use all of them.
"""

import jax
import jax.numpy as jnp

from llm_jax.models.moe import routing

_SMALL = 1e-20
_OUT = -jnp.inf


def softmax_top_k(
    logits_BTE: jax.Array,
    k: int,
    *,
    is_normalised: bool,
    scale: float = 1.0,
    num_groups: int = 1,
    groups_per_token: int = 1,
    bias_E: jax.Array | None = None,
) -> routing.Routing:
    """The k largest of a softmax over all experts (Shazeer et al. 2017, section 2.1).

    Args:
      logits_BTE: float32.
      k: experts of a token.
      is_normalised: whether the chosen weights sum to 1 (Mixtral, Jiang et al. 2024, equation 2: the same
        as a softmax of the chosen logits alone) or keep what they have of the whole softmax (OLMoE,
        Muennighoff et al. 2024).
      scale: multiplies the weights (DeepSeek-V2's `routed_scaling_factor`).
      num_groups, groups_per_token: experts come from the groups with the best expert (DeepSeek-V2, 2024,
        section 2.2.2, device-limited routing).
      bias_E: added to what is chosen by, and not to weights (Wang et al. 2024).
    """
    scores_BTE = jax.nn.softmax(logits_BTE)
    by_BTE = scores_BTE if bias_E is None else scores_BTE + bias_E
    by_BTE = _within_groups(by_BTE, num_groups, groups_per_token, num_best=1)
    return chosen(scores_BTE, scores_BTE, by_BTE, k, is_normalised, scale)


def sigmoid_top_k(
    logits_BTE: jax.Array,
    k: int,
    *,
    is_normalised: bool,
    scale: float = 1.0,
    num_groups: int = 1,
    groups_per_token: int = 1,
    bias_E: jax.Array | None = None,
) -> routing.Routing:
    """The k largest of sigmoids, each expert scored by itself (DeepSeek-V3, 2024, section 2.1.2).

    Arguments as of `softmax_top_k`, but that a group is as good as its two best experts together. With
    `bias_E` moved by `balance.next_bias` this is its balancing without a loss.
    """
    affinity_BTE = jax.nn.sigmoid(logits_BTE)
    scores_BTE = affinity_BTE / (jnp.sum(affinity_BTE, axis=-1, keepdims=True) + _SMALL)
    by_BTE = affinity_BTE if bias_E is None else affinity_BTE + bias_E
    by_BTE = _within_groups(by_BTE, num_groups, groups_per_token, num_best=2)
    return chosen(affinity_BTE, scores_BTE, by_BTE, k, is_normalised, scale)


def switch(logits_BTE: jax.Array) -> routing.Routing:
    """The one best expert, weighted by its probability (Fedus et al. 2021, section 2.1).

    Its jitter is in what the router reads (`layer.Router`), its capacity in the dispatch.
    """
    return softmax_top_k(logits_BTE, 1, is_normalised=False)


def gshard(logits_BTE: jax.Array, draws_BT: jax.Array | None = None) -> routing.Routing:
    """The two best experts, of which the second is used at random (Lepikhin et al. 2020, algorithm 1).

    Args:
      logits_BTE: float32.
      draws_BT: uniform in [0, 1); the second expert is used where twice its weight is larger. None: it
        always is.
    """
    both = softmax_top_k(logits_BTE, 2, is_normalised=True)
    if draws_BT is None:
        return both
    is_second_BTR = jnp.arange(2) == 1
    is_unlucky_BTR = 2.0 * both.weights_BTR <= draws_BT[..., None]
    return both.without(is_second_BTR & is_unlucky_BTR)


def relu(logits_BTE: jax.Array, max_experts: int | None = None) -> routing.Routing:
    """All experts above 0, weighted by how far (ReMoE, Wang et al. 2024, section 3.1).

    How many there are is learned: `balance.relu_loss` presses for as few as are wanted.

    Args:
      logits_BTE: float32.
      max_experts: of a token, its largest; None: no bound.
    """
    num_tokens, num_experts = logits_BTE.shape[1:]
    gates_BTE = jax.nn.relu(logits_BTE)
    scores_BTE = gates_BTE / (jnp.sum(gates_BTE, axis=-1, keepdims=True) + _SMALL)
    if max_experts is None or max_experts >= num_experts:
        room = num_tokens * num_experts
        return routing.of_mask(gates_BTE > 0, gates_BTE, scores_BTE, room)
    best = chosen(gates_BTE, scores_BTE, gates_BTE, max_experts, False, 1.0)
    return best.without(best.weights_BTR <= 0)


def hashed(tokens_BT: jax.Array, num_experts: int, k: int) -> routing.Routing:
    """Experts by a hash of the token's id (Roller et al. 2021, section 3.1): nothing is learned.

    Further experts are those that follow the first, so that no two are the same.

    Args:
      tokens_BT: int32 ids.
      num_experts, k: E, and how many of them a token has.
    """
    return _even(_mixed(tokens_BT.astype(jnp.uint32)), num_experts, k)


def at_random(bits_BT: jax.Array, num_experts: int, k: int) -> routing.Routing:
    """Experts by lot, a control (THOR, Zuo et al. 2022, has them so); `bits_BT` are uint32."""
    return _even(bits_BT, num_experts, k)


def _even(bits_BT: jax.Array, num_experts: int, k: int) -> routing.Routing:
    first_BT = (bits_BT % jnp.uint32(num_experts)).astype(jnp.int32)
    experts_BTR = (first_BT[..., None] + jnp.arange(k, dtype=jnp.int32)) % num_experts
    weights_BTR = jnp.full_like(experts_BTR, 1.0 / k, jnp.float32)
    scores_BTE = jnp.zeros_like(first_BT, jnp.float32)[..., None] + jnp.zeros(num_experts)
    return routing.of_chosen(experts_BTR, weights_BTR, scores_BTE)


def _mixed(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (Appleby 2011), a permutation of uint32."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def chosen(
    weights_BTE: jax.Array,
    scores_BTE: jax.Array,
    by_BTE: jax.Array,
    k: int,
    is_normalised: bool,
    scale: float,
) -> routing.Routing:
    """Returns the k experts with the largest `by_BTE`, weighted by `weights_BTE`."""
    experts_BTR = jax.lax.top_k(jax.lax.stop_gradient(by_BTE), k)[1]
    weights_BTR = routing.at(weights_BTE, experts_BTR)
    if is_normalised:
        weights_BTR /= jnp.sum(weights_BTR, axis=-1, keepdims=True) + _SMALL
    return routing.of_chosen(experts_BTR, scale * weights_BTR, scores_BTE)


def _within_groups(
    by_BTE: jax.Array, num_groups: int, groups_per_token: int, num_best: int
) -> jax.Array:
    """Returns the scores with those of all but each token's best groups out of the running."""
    if num_groups == 1:
        return by_BTE
    shape = by_BTE.shape
    groups = by_BTE.reshape(*shape[:2], num_groups, -1)
    values = jnp.sum(jax.lax.top_k(groups, num_best)[0], axis=-1)
    best = jax.lax.top_k(values, groups_per_token)[1]
    is_in = jnp.any(best[..., None] == jnp.arange(num_groups), axis=2)
    return jnp.where(is_in[..., None], groups, _OUT).reshape(shape)
