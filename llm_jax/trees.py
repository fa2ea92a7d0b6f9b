"""Trees of arrays as nested dicts by name, and fingerprints of what they hold."""

from collections.abc import Mapping
import math
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


def name_of(path: tuple[Any, ...]) -> str:
    """Returns the name of the leaf at a tree path: `stack/layers/mlp/up_DF`, as `inspect` prints it."""
    return "/".join(path_keys(path))


def by_name(tree: Any) -> dict[str, Any]:
    """Returns a tree's leaves by their names."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns leaves by their names as nested dicts."""
    found: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return found


def to_nested(tree: Any) -> dict[str, Any]:
    """Returns a tree's arrays as nested dicts by name, which any later version can read."""
    return nested(by_name(tree))


def from_nested(target: Any, nested: Mapping[str, Any]) -> Any:
    """Returns `target` with its leaves taken from nested dicts made by `to_nested`."""

    def pick(path, _):
        value = nested
        for name in path_keys(path):
            value = value[name]
        return value

    return jax.tree_util.tree_map_with_path(pick, target)


# A CPU holds the words that it sums over in memory, so it is given pieces of an array.
_PIECE_ELEMENTS = 1 << 20


def _fingerprint(x: jax.Array) -> jax.Array:
    x = jax.device_put(x, jax.memory.Space.Device)  # from the host's memory, if it is there
    pieces = _num_pieces(x)
    if pieces == 1:
        return _sum_of_bits(x, jnp.uint32(0))
    if pieces < x.shape[0]:  # jaxlib 0.10 copies an array to give it a dimension of 1
        x = x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:])
    stride = jnp.uint32(math.prod(x.shape[1:]) % (1 << 32))

    def add(total, piece_and_number):
        piece, number = piece_and_number
        return total + _sum_of_bits(piece, number * stride), None

    numbers = jnp.arange(pieces, dtype=jnp.uint32)
    return jax.lax.scan(add, jnp.uint32(0), (x, numbers))[0]


def _num_pieces(x: jax.Array) -> int:
    """Returns how many pieces of the first dimension are summed one after the other."""
    if x.size <= _PIECE_ELEMENTS or jax.typeof(x).sharding.spec[0] is not None:
        return 1
    length = x.shape[0]
    enough = -(-x.size // _PIECE_ELEMENTS)
    return next((n for n in range(enough, length) if length % n == 0), length)


def _sum_of_bits(x: jax.Array, start: jax.Array) -> jax.Array:
    """Returns the sum of the hashed elements of `x`, whose places are counted from `start`."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    # Each element is hashed together with its place, so that an exchange of two shows as well: a
    # sum with factors misses it where the values or the places differ by powers of two.
    index = jnp.zeros((1,) * x.ndim, jnp.uint32)
    for dim, size in enumerate(x.shape):
        shape = [1] * x.ndim
        shape[dim] = size
        index = index * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32).reshape(shape)
    return jnp.sum(_mix(words + (index + start) * jnp.uint32(2654435761)), dtype=jnp.uint32)


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
    return {name: int(value) for name, value in by_name(sums).items()}
