"""What is added to scores, as small objects: a slope, a table of buckets, or a full array.

A bias is a pytree whose arrays are parameters: gradients flow to slopes, tables and arrays alike.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp


class Bias:
    """A term added to the scores of query slot `t` and key slot `s` after scale and soft-cap."""

    def scores_BKGTS(self, t_T: jax.Array, s_S: jax.Array) -> jax.Array:
        """Returns the term, float32, broadcastable to [B, K, G, T, S]."""
        raise NotImplementedError


def _bias(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def _distance_TS(t_T: jax.Array, s_S: jax.Array) -> jax.Array:
    return t_T[:, None] - s_S[None, :]


@_bias
class Alibi(Bias):
    """`-slope * |t - s|` (Press et al. 2022), a slope for each head, float32."""

    slopes_KG: Any

    def by_distance_KGD(self, distance: jax.Array) -> jax.Array:
        """Returns the value of each `t - s`, [K, G, *distances]."""
        slopes = self.slopes_KG.reshape(*self.slopes_KG.shape, *(1,) * distance.ndim)
        return -slopes * jnp.abs(distance).astype(jnp.float32)

    def scores_BKGTS(self, t_T, s_S):
        return self.by_distance_KGD(_distance_TS(t_T, s_S))[None]


@_bias
class Relative(Bias):
    """T5's learned bias by bucket of distance (Raffel et al. 2020, section 2.1).

    Attributes:
      table_KGU: float32, a value for each head and bucket.
      max_distance: from here on all distances share the last bucket.
      is_bidirectional: half of the buckets are for keys after the query; otherwise those share the
        bucket of distance 0.
    """

    table_KGU: Any
    max_distance: int = dataclasses.field(default=128, metadata={"static": True})
    is_bidirectional: bool = dataclasses.field(default=True, metadata={"static": True})

    def buckets(self, distance: jax.Array) -> jax.Array:
        """Returns the bucket, int32, of each `t - s`."""
        num_buckets = self.table_KGU.shape[-1]
        bucket = jnp.zeros_like(distance)
        if self.is_bidirectional:
            num_buckets //= 2
            bucket = jnp.where(distance < 0, num_buckets, 0)
            distance = jnp.abs(distance)
        distance = jnp.maximum(distance, 0)
        # Half of them exact, the rest as wide as the logarithm of the distance says.
        num_exact = num_buckets // 2
        ratio = jnp.maximum(distance, 1).astype(jnp.float32) / num_exact
        octaves = jnp.log(ratio) / math.log(self.max_distance / num_exact)
        wide = num_exact + (octaves * (num_buckets - num_exact)).astype(jnp.int32)
        wide = jnp.minimum(wide, num_buckets - 1)
        return bucket + jnp.where(distance < num_exact, distance, wide)

    def by_distance_KGD(self, distance: jax.Array) -> jax.Array:
        """Returns the value of each `t - s`, [K, G, *distances]."""
        buckets = self.buckets(distance)
        # Heads lie where the table has them, distances where they are (those of rows, in generation).
        spec = jax.typeof(self.table_KGU).sharding.spec[:-1] + jax.typeof(buckets).sharding.spec
        return self.table_KGU.at[..., buckets].get(out_sharding=spec if any(spec) else None)

    def scores_BKGTS(self, t_T, s_S):
        return self.by_distance_KGD(_distance_TS(t_T, s_S))[None]


@_bias
class Full(Bias):
    """An array [1 or B, 1 or K, 1 or G, T, S], cut like the queries by whoever cuts them."""

    bias_BKGTS: Any

    def scores_BKGTS(self, t_T, s_S):
        return self.bias_BKGTS.astype(jnp.float32)


def cut(bias: Bias | None, queries: slice, keys: slice) -> Bias | None:
    """Returns the bias for some of the queries and keys; slots tell all but a full array."""
    if not isinstance(bias, Full):
        return bias
    return dataclasses.replace(bias, bias_BKGTS=bias.bias_BKGTS[..., queries, keys])
