"""SOAP: Adam in the eigenbases of each matrix's gradients (Vyas et al. 2024, algorithm 3).

A matrix of I inputs and O outputs keeps the running means of G G^T, [I, I], and of G^T G, [O, O]. Adam's second moment
lives in their eigenbases, which are brought up to date every few steps by one power iteration and a QR decomposition;
its first moment lives where the parameters do. Layers and experts are matrices each by itself.
"""

import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from llm_jax import dims

Sides = tuple[Any, Any]  # of a matrix: what belongs to its inputs, and to its outputs


class SoapState(NamedTuple):
    """What SOAP keeps.

    Attributes:
      count: int32, updates so far.
      mean: of gradients, as the parameters.
      variance: of gradients in their bases, as the parameters.
      covariances: of inputs, [..., I, I], and of outputs, [..., O, O]; a side that is too wide has none.
      bases: of the same shapes; columns are eigenvectors, that of the largest eigenvalue first.
    """

    count: jax.Array
    mean: Any
    variance: Any
    covariances: Sides
    bases: Sides


def scale_by_soap(
    b1: float, b2: float, epsilon: float, every: int, max_width: int
) -> optax.GradientTransformation:
    """Returns the direction, of the size of Adam's, for trees of matrices that `dims.MATRICES` knows.

    Two things differ from the authors' code: the first update is Adam's, as there is no basis before a gradient, where
    theirs makes none; and bases begin with the axes of the parameters, where theirs begin with eigenvectors, which take
    minutes to compile for a TPU.

    Args:
      b1, b2: decay of the first moment, and of the second one and the covariances.
      epsilon: added to the root of the second moment.
      every: updates between refreshes of the bases, the first of which follows the first update.
      max_width: a side that is wider keeps its axes for a basis.
    """

    def init(params):
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        bases = _transposed(tree, [_axes(path, leaf, max_width) for path, leaf in leaves])
        zeros = lambda like: jax.tree.map(jnp.zeros_like, like)  # noqa: E731
        return SoapState(
            jnp.zeros((), jnp.int32), zeros(params), zeros(params), zeros(bases), bases
        )

    def update(updates, state, params=None):
        del params
        # The compiler, not the types, shards these products.
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
        return jax.sharding.auto_axes(step, out_sharding=shardings)(updates, state)

    def step(updates, state):
        count = state.count + 1
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        kept = [
            tree.flatten_up_to(one)
            for one in (state.mean, state.variance, *state.covariances, *state.bases)
        ]
        found = []
        for (path, gradient), mean, variance, *sides in zip(leaves, *kept, strict=True):
            matrix = _matrix_shape(path, gradient)
            covariances, bases = tuple(sides[:2]), tuple(sides[2:])
            gradient, mean, variance = (x.reshape(matrix) for x in (gradient, mean, variance))
            mean = b1 * mean + (1 - b1) * gradient
            variance = b2 * variance + (1 - b2) * jnp.square(_to(bases, gradient))
            scale = jnp.sqrt(variance / (1 - b2**count)) + epsilon
            direction = _from(bases, _to(bases, mean) / (1 - b1**count) / scale)
            covariances = _moved(covariances, gradient, b2)
            operands = (bases, variance, covariances, gradient)
            bases, variance = jax.lax.cond(
                (count - 1) % every == 0,
                lambda *operands: _refreshed(count, 1 - b2, *operands),
                lambda bases, variance, *_: (bases, variance),
                *operands,
            )
            found.append((direction, mean, variance, covariances, bases))
        directions, means, variances, covariances, bases = zip(*found, strict=True)
        shaped = lambda flat: tree.unflatten(  # noqa: E731
            [x.reshape(leaf.shape) for x, (_, leaf) in zip(flat, leaves, strict=True)]
        )
        state = SoapState(
            count,
            shaped(means),
            shaped(variances),
            _transposed(tree, covariances),
            _transposed(tree, bases),
        )
        return shaped(directions), state

    return optax.GradientTransformation(init, update)


def _matrix_shape(path: tuple[Any, ...], leaf: jax.Array) -> tuple[int, ...]:
    """Returns [..., I, O]: letters of inputs come before those of outputs, layers and experts before both."""
    inputs, outputs = (len(letters) for letters in dims.MATRICES[dims.of_path(path)])
    batch = leaf.ndim - inputs - outputs
    return (
        *leaf.shape[:batch],
        math.prod(leaf.shape[batch : batch + inputs]),
        math.prod(leaf.shape[batch + inputs :]),
    )


def _axes(path: tuple[Any, ...], leaf: jax.Array, max_width: int) -> Sides:
    """Returns the bases before there is a gradient; rows lie where those of the matrix do, as far as it can be said."""
    *batch, num_inputs, num_outputs = _matrix_shape(path, leaf)
    spec = jax.typeof(leaf).sharding.spec
    first_output = len(batch) + len(dims.MATRICES[dims.of_path(path)][0])
    sides = []
    for width, place in ((num_inputs, len(batch)), (num_outputs, first_output)):
        if width > max_width:
            sides.append(optax.MaskedNode())
            continue
        eye = jnp.broadcast_to(jnp.eye(width), (*batch, width, width))
        sides.append(
            jax.sharding.reshard(eye, PartitionSpec(*spec[: len(batch)], spec[place], None))
        )
    return tuple(sides)


def _transposed(tree: Any, of_leaves: Any) -> Sides:
    """Returns for each side the tree of what the leaves have of it."""
    return tuple(tree.unflatten(side) for side in zip(*of_leaves, strict=True))


def _is_kept(side: Any) -> bool:
    return not isinstance(side, optax.MaskedNode)


def _to(bases: Sides, matrix: jax.Array) -> jax.Array:
    """Returns a matrix in its bases."""
    inputs, outputs = bases
    if _is_kept(inputs):
        matrix = inputs.mT @ matrix
    return matrix @ outputs if _is_kept(outputs) else matrix


def _from(bases: Sides, matrix: jax.Array) -> jax.Array:
    """Returns a matrix that is in its bases on the axes of the parameters."""
    return _to(tuple(side.mT if _is_kept(side) else side for side in bases), matrix)


def _moved(covariances: Sides, gradient: jax.Array, b2: float) -> Sides:
    products = (lambda g: g @ g.mT, lambda g: g.mT @ g)
    return tuple(
        b2 * side + (1 - b2) * product(gradient) if _is_kept(side) else side
        for side, product in zip(covariances, products, strict=True)
    )


def _refreshed(
    count: jax.Array,
    share: float,
    bases: Sides,
    variance: jax.Array,
    covariances: Sides,
    gradient: jax.Array,
) -> tuple[Sides, jax.Array]:
    """Returns bases nearer to the covariances' eigenvectors, and the variance in their order.

    The first refresh begins with the axes of the parameters. What was seen of the variance then was on these: it
    becomes that of the gradient in the new bases, `share` of it.
    """
    found = []
    for axis, (covariance, basis) in enumerate(zip(covariances, bases, strict=True)):
        if _is_kept(covariance):
            values = jnp.sum(basis * (covariance @ basis), axis=-2)
            order = jnp.argsort(values, axis=-1, descending=True)
            along = order[..., :, None] if axis == 0 else order[..., None, :]
            variance = jnp.take_along_axis(variance, along, axis=axis - 2)
            basis = jnp.take_along_axis(basis, order[..., None, :], axis=-1)
            basis = _orthonormal(covariance @ basis)
        found.append(basis)
    bases = tuple(found)
    return bases, jnp.where(count == 1, share * jnp.square(_to(bases, gradient)), variance)


def _orthonormal(matrices: jax.Array) -> jax.Array:
    """Returns an orthonormal basis of the columns, of which each of the first ones span what those span."""
    # One after the other: for a TPU a batch of twelve takes ten times as long to compile, and all their memory at once.
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    return jax.lax.map(lambda one: jnp.linalg.qr(one)[0], flat).reshape(matrices.shape)
