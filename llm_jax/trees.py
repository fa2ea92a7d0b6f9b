"""Trees of arrays as nested dicts by name, and fingerprints of what they hold."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def path_keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Names the entries of a tree path; a variable's own `value` is left out."""
    names = []
    for entry in path:
        name = getattr(entry, "name", getattr(entry, "key", getattr(entry, "idx", None)))
        names.append(str(name))
    return tuple(names[:-1] if names[-1] == "value" else names)


def to_nested(tree: Any) -> dict[str, Any]:
    """Returns a tree's arrays as nested dicts by name, which any later version can read."""
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, last = path_keys(path)
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return nested


def from_nested(target: Any, nested: Mapping[str, Any]) -> Any:
    """Returns `target` with its leaves taken from nested dicts made by `to_nested`."""

    def pick(path, _):
        value = nested
        for name in path_keys(path):
            value = value[name]
        return value

    return jax.tree_util.tree_map_with_path(pick, target)


def _fingerprint(x: jax.Array) -> jax.Array:
    x = jax.device_put(x, jax.memory.Space.Device)  # from the host's memory, if it is there
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    # Each element is hashed together with its place, so that an exchange of two shows as well: a
    # sum with factors misses it where the values or the places differ by powers of two.
    index = jnp.zeros((1,) * x.ndim, jnp.uint32)
    for dim, size in enumerate(x.shape):
        shape = [1] * x.ndim
        shape[dim] = size
        index = index * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32).reshape(shape)
    return jnp.sum(_mix(words + index * jnp.uint32(2654435761)), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3, one to one on uint32: a changed bit always shows."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def _fingerprints(tree: Any) -> Any:
    return jax.tree.map(_fingerprint, tree)


def fingerprints(nested: Mapping[str, Any]) -> dict[str, int]:
    """Returns a 32-bit sum over the bits of each array, by path; independent of sharding."""
    sums = jax.device_get(_fingerprints(nested))
    flat = jax.tree_util.tree_flatten_with_path(sums)[0]
    return {"/".join(path_keys(path)): int(value) for path, value in flat}
