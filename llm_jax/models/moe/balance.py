"""How evenly experts are used: losses that press for it, statistics that show it, and what is learned of it
without gradients."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.models.moe import routing

# Of ReMoE's penalty: where it starts, and by what it grows or shrinks in a step.
FIRST_PENALTY = 1e-8


# The next value of a parameter, by its name, given it and what routers did.
Moves = dict[str, Callable[[jax.Array, "Routed"], jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
    """What a layer's router did with a batch: float32 sums, to be added up over microbatches.

    Stacked, each has the layers in front.

    Attributes:
      loss: what the layer adds to the objective, a mean over the batch.
      load_E: slots of each expert, before any is dropped.
      num_dropped: slots of tokens that found no room.
      num_tokens: tokens, padding not counted.
      confidence: the score of the best expert, summed over tokens.
      balance: the balance loss before its weight, a mean over the batch.
      z_squared: logsumexp(logits)^2, summed over tokens.
    """

    loss: jax.Array
    load_E: jax.Array
    num_dropped: jax.Array
    num_tokens: jax.Array
    confidence: jax.Array
    balance: jax.Array
    z_squared: jax.Array


def load_balance(routed: routing.Routing, is_token_BT: jax.Array, over: str = "batch") -> jax.Array:
    """Returns E times the product of each expert's share of slots and of scores, summed: 1 if even.

    Args:
      routed: of a batch; its scores have the gradient.
      is_token_BT: whether there is a token; others do not count.
      over: what shares are taken of: `batch` (Fedus et al. 2021, equations 4 to 6: all of the batch, on
        whatever devices it lies; Qiu et al. 2025 have why that beats smaller parts), or `sequence`, the
        mean of each row's own (DeepSeek-V3, 2024, equations 17 to 20).
    """
    counts_BE, num_tokens_B = routed.counts_BE(), jnp.sum(is_token_BT, axis=1, dtype=jnp.float32)
    scores_BE = jnp.sum(jnp.where(is_token_BT[..., None], routed.scores_BTE, 0.0), axis=1)
    if over == "batch":
        counts_BE, scores_BE = jnp.sum(counts_BE, 0), jnp.sum(scores_BE, 0)
        num_tokens_B = jnp.sum(num_tokens_B)
    slots_B = jnp.maximum(jnp.sum(counts_BE, axis=-1), 1.0)
    product_B = jnp.sum(jax.lax.stop_gradient(counts_BE) * scores_BE, axis=-1)
    losses_B = routed.num_experts * product_B / slots_B / jnp.maximum(num_tokens_B, 1.0)
    has_tokens_B = num_tokens_B > 0
    return jnp.sum(losses_B * has_tokens_B) / jnp.maximum(jnp.sum(has_tokens_B), 1)


def relu_loss(gates_BTE: jax.Array, is_token_BT: jax.Array, experts_per_token: int) -> jax.Array:
    """Returns the mean of a token's gates, each times its expert's load (ReMoE, 2024, equations 9 and 10).

    Args:
      gates_BTE: float32, of `routers.relu`, not normalised.
      is_token_BT: whether there is a token.
      experts_per_token: how many are wanted on average: with that many, evenly used, loads are 1.
    """
    gates_BTE = jnp.where(is_token_BT[..., None], gates_BTE, 0.0)
    num_tokens = jnp.maximum(jnp.sum(is_token_BT, dtype=jnp.float32), 1.0)
    used_E = jnp.sum(gates_BTE > 0, axis=(0, 1), dtype=jnp.float32)
    load_E = used_E * gates_BTE.shape[2] / (num_tokens * experts_per_token)
    return jnp.sum(load_E * jnp.sum(gates_BTE, axis=(0, 1))) / num_tokens


def z_squared(logits_BTE: jax.Array, is_token_BT: jax.Array) -> jax.Array:
    """Returns the square of each token's logsumexp, summed (ST-MoE, Zoph et al. 2022, equation 5)."""
    squared_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
    return jnp.sum(jnp.where(is_token_BT, squared_BT, 0.0))


# --- statistics -------------------------------------------------------------------------------------


def max_violation(load_E: jax.Array) -> jax.Array:
    """Returns how far the busiest expert is above the mean load, as a share of it (Wang et al. 2024).

    Experts are the last dimension; 0 is even, E - 1 the most.
    """
    mean = jnp.mean(load_E, axis=-1)
    return jnp.max(load_E, axis=-1) / jnp.maximum(mean, 1e-9) - 1.0


def load_entropy(load_E: jax.Array) -> jax.Array:
    """Returns the entropy of the load over that of an even one, in [0, 1]."""
    share_E = load_E / jnp.maximum(jnp.sum(load_E, axis=-1, keepdims=True), 1e-9)
    entropy = -jnp.sum(share_E * jnp.log(jnp.maximum(share_E, 1e-30)), axis=-1)
    return entropy / jnp.log(load_E.shape[-1])


def statistics(routed: Routed) -> dict[str, jax.Array]:
    """Returns what the log shows of a layer, or of each layer where they are stacked."""
    num_tokens = jnp.maximum(routed.num_tokens, 1.0)
    slots = jnp.maximum(jnp.sum(routed.load_E, axis=-1), 1.0)
    return {
        "max_violation": max_violation(routed.load_E),
        "load_entropy": load_entropy(routed.load_E),
        "dead_experts": jnp.sum(routed.load_E == 0, axis=-1, dtype=jnp.float32),
        "drop_fraction": routed.num_dropped / slots,
        "experts_per_token": jnp.sum(routed.load_E, axis=-1) / num_tokens,
        "confidence": routed.confidence / num_tokens,
        "balance_loss": routed.balance,
        "z_squared": routed.z_squared / num_tokens,
    }


def metrics(routed: Routed, stack: str, num_micro: int) -> dict[str, jax.Array]:
    """Returns what the log has of a stack of layers: means over layers, all of them, and loads.

    Args:
      routed: stacked by layer, added up over microbatches.
      stack: its name, or "" for the only one.
      num_micro: microbatches.
    """
    prefix = f"moe/{stack}/" if stack else "moe/"
    # Means over a batch have been added up, too.
    routed = dataclasses.replace(routed, balance=routed.balance / num_micro)
    by_layer = statistics(routed)
    slots_L1 = jnp.maximum(jnp.sum(routed.load_E, axis=-1, keepdims=True), 1.0)
    result = {f"{prefix}{name}": jnp.mean(values) for name, values in by_layer.items()}
    result |= {f"{prefix}layers/{name}": values for name, values in by_layer.items()}
    return result | {f"{prefix}layers/load": routed.load_E / slots_L1}


# --- learned without gradients ----------------------------------------------------------------------


def next_bias(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
    """Returns the bias for the next step: up for experts below the mean load, down for those above.

    Loss-free balancing (Wang et al. 2024, algorithm 1). Experts are the last dimension.
    """
    above_E = load_E - jnp.mean(load_E, axis=-1, keepdims=True)
    return bias_E - rate * jnp.sign(above_E)


def next_penalty(
    penalty: jax.Array,
    load_E: jax.Array,
    num_tokens: jax.Array,
    experts_per_token: int,
    rate: float,
) -> jax.Array:
    """Returns the weight of `relu_loss` for the next step: larger while tokens have too many experts.

    ReMoE (2024, equation 8), for each layer instead of all of them together.
    """
    used = jnp.sum(load_E, axis=-1) / jnp.maximum(num_tokens, 1.0)
    return penalty * rate ** jnp.sign(used - experts_per_token)


def moved(model: Any, moves: Moves, routed: dict[str, Routed]) -> Any:
    """Returns a model whose parameters without gradients have moved by what routers did.

    Args:
      model: an nnx module with stacks of layers.
      moves: for the last name of such a parameter, its next value.
      routed: of each stack, by the name in its parameters' path (`encoder`, `decoder`, or "" for the only
        one).
    """

    def move(path, leaf):
        parts = [getattr(entry, "name", None) for entry in path]
        name = [part for part in parts if part not in (None, "value")][-1]
        if name not in moves:
            return leaf
        of_stack = [routed[key] for key in routed if key == "" or key in parts]
        return moves[name](leaf, of_stack[0]).astype(leaf.dtype)

    if not moves:
        return model
    return jax.tree_util.tree_map_with_path(move, model)
