"""Keys and values as int8 with a scale for each slot and head."""

import jax
import jax.numpy as jnp

_TOP = 127


def quantized(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns vectors along the last dimension as int8, and what one unit of each is worth.

    Symmetric: the largest magnitude of a vector becomes 127. An element is off by half a unit at most
    (and by what float32 rounds), that is by the largest magnitude over 254.

    Args:
      x: [..., C].

    Returns:
      int8 [..., C] and float32 [...]; zeros have the scale 0, and so has what is smaller than 127 of
      the least normal float32.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / _TOP
    units = x / jnp.where(scale > 0.0, scale, 1.0)[..., None]
    return jnp.clip(jnp.round(units), -_TOP, _TOP).astype(jnp.int8), scale


def restored(units: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the vectors, float32 [..., C], that `quantized` rounded."""
    return units.astype(jnp.float32) * scale[..., None]
