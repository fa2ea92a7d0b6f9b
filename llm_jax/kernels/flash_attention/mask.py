"""Who may attend to whom, as a small object instead of a T x S array."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """A conjunction of conditions on query slot `t` and key slot `s`.

    Slots count array positions, not tokens of a document: query `t` of the array sits at slot
    `offset + t`. Packed documents and padding are told apart by segment ids; a pair attends where
    both ids are equal.

    Attributes:
      is_causal: `s <= t`.
      window: `t - s < window`; None for no limit.
      q_segments_BT, k_segments_BS: int32 segment ids, both or neither.
      offset: int32 scalar, the slot of the first query; a cache makes it more than 0.
    """

    is_causal: bool = dataclasses.field(default=True, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    q_segments_BT: jax.Array | None = None
    k_segments_BS: jax.Array | None = None
    offset: jax.Array | int = 0

    def distance_TS(self, num_queries: int, num_keys: int, start: jax.Array | int = 0) -> jax.Array:
        """Returns `t - s` in slots, int32 [T, S], for queries from `start` on."""
        t_T1 = self.offset + start + jnp.arange(num_queries)[:, None]
        return t_T1 - jnp.arange(num_keys)[None, :]

    def allowed_BTS(self, num_queries: int, num_keys: int, start: jax.Array | int = 0) -> jax.Array:
        """Returns the Boolean array that this object stands for, [1 or B, T, S]."""
        distance_TS = self.distance_TS(num_queries, num_keys, start)
        allowed_TS = jnp.ones(distance_TS.shape, bool)
        if self.is_causal:
            allowed_TS &= distance_TS >= 0
        if self.window is not None:
            allowed_TS &= distance_TS < self.window
        allowed_BTS = allowed_TS[None]
        if self.q_segments_BT is not None:
            q_BT = self.q_segments_BT
            if num_queries != q_BT.shape[1]:
                q_BT = jax.lax.dynamic_slice_in_dim(q_BT, start, num_queries, axis=1)
            allowed_BTS = allowed_BTS & (q_BT[:, :, None] == self.k_segments_BS[:, None, :])
        return allowed_BTS
