"""What a router gives: the experts of each token, and how much of each."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Experts of each token. A row of tokens is routed by itself, whatever else is in the batch.

    Attributes:
      experts_BTR: int32, of each slot; `num_experts` where a slot is not used.
      weights_BTR: float32, what an expert's result is multiplied by; 0 where a slot is not used.
      scores_BTE: float32, what the router thinks of each expert, summing to 1 over those it weighs: of
        balance losses and confidence. Zeros for routers that score nothing.
      num_experts: E.
      room: how many slots of a row are used at the most.
    """

    experts_BTR: jax.Array
    weights_BTR: jax.Array
    scores_BTE: jax.Array
    num_experts: int = dataclasses.field(metadata={"static": True})
    room: int = dataclasses.field(metadata={"static": True})

    @property
    def is_used_BTR(self) -> jax.Array:
        return self.experts_BTR < self.num_experts

    def weights_BTE(self) -> jax.Array:
        """Returns the weight of each expert for each token, 0 for most."""
        return jnp.sum(self.weights_BTR[..., None] * self._is_of_BTRE(), axis=2)

    def counts_BE(self) -> jax.Array:
        """Returns how many slots of each row an expert has, float32."""
        return jnp.sum(self._is_of_BTRE(), axis=(1, 2), dtype=jnp.float32)

    def without(self, is_left_out_BTR: jax.Array) -> "Routing":
        """Returns the routing with some slots not used."""
        return dataclasses.replace(
            self,
            experts_BTR=jnp.where(is_left_out_BTR, self.num_experts, self.experts_BTR),
            weights_BTR=jnp.where(is_left_out_BTR, 0.0, self.weights_BTR),
        )

    def _is_of_BTRE(self) -> jax.Array:
        return self.experts_BTR[..., None] == jnp.arange(self.num_experts)


def of_chosen(experts_BTR: jax.Array, weights_BTR: jax.Array, scores_BTE: jax.Array) -> Routing:
    """Returns the routing of tokens that have chosen R experts each."""
    num_tokens, num_slots = experts_BTR.shape[1:]
    return Routing(
        experts_BTR, weights_BTR, scores_BTE, scores_BTE.shape[2], room=num_tokens * num_slots
    )


def of_mask(
    is_chosen_BTE: jax.Array, weights_BTE: jax.Array, scores_BTE: jax.Array, room: int
) -> Routing:
    """Returns the routing of tokens that have any number of experts, with a slot for each."""
    num_experts = is_chosen_BTE.shape[2]
    experts_BTE = jnp.where(is_chosen_BTE, jnp.arange(num_experts), num_experts)
    weights_BTE = jnp.where(is_chosen_BTE, weights_BTE, 0.0)
    return Routing(experts_BTE, weights_BTE, scores_BTE, num_experts, room)


def at(values_BTE: jax.Array, experts_BTR: jax.Array) -> jax.Array:
    """Returns the values of chosen experts, [B, T, R].

    A masked sum instead of a gather, whose gradient would be a scatter.
    """
    is_of_BTRE = experts_BTR[..., None] == jnp.arange(values_BTE.shape[-1])
    return jnp.sum(jnp.where(is_of_BTRE, values_BTE[:, :, None], 0.0), axis=-1)
