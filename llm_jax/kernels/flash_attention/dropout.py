"""Dropout of attention weights by a counter: the same mask in any order, block size and program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Zeroes weights with probability `rate` and scales the rest by `1 / (1 - rate)`.

    Whether a weight stays is a hash of seed, row, head, query and key, so the backward pass finds
    again what the forward pass drew and no mask is stored.

    Attributes:
      seed: uint32 scalar; a new one for each layer and step.
      rate: in [0, 1).
    """

    seed: Any
    rate: float = dataclasses.field(metadata={"static": True})

    def factors(self, row: Any, head: Any, t: Any, s: Any) -> jax.Array:
        """Returns 0 or `1 / (1 - rate)`, float32, for int32 indices broadcast together."""
        bits = _hash(_word(self.seed) + _word(row) * jnp.uint32(0x9E3779B1))
        bits = _hash(bits + _word(head) * jnp.uint32(0x85EBCA77))
        bits = _hash(bits + _word(t))
        bits = _hash(bits + _word(s) * jnp.uint32(0xC2B2AE3D))
        threshold = jnp.uint32(round(self.rate * 2**32))
        return jnp.where(bits >= threshold, jnp.float32(1.0 / (1.0 - self.rate)), 0.0)


def _word(x: Any) -> jax.Array:
    return jnp.asarray(x).astype(jnp.uint32)


def _hash(x: jax.Array) -> jax.Array:
    """A permutation of 32-bit words in which each input bit flips about half of the output's
    (Wellons 2018, "lowbias32")."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
