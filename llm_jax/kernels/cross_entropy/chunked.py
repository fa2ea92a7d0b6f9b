"""Cross-entropy by chunks of tokens: logits never exist whole, forward or backward.

The gradient is made in the forward pass, beside the loss: what multiplies it is one scalar, so each
chunk's logits serve the loss and both gradients, and no product is done twice (three instead of the
four of a chunk that is recomputed).
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

_Axes = tuple[str, ...]  # of the mesh


@dataclasses.dataclass(frozen=True)
class _Static:
    head_dims: str
    softcap: float | None
    z_loss: float
    chunk: int


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Mesh axes over which the tokens, and the vocabulary and width of the head, are cut."""

    tokens: _Axes = ()
    vocabulary: _Axes = ()
    width: _Axes = ()


def cross_entropy(
    x_BTD: jax.Array,
    head: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    head_dims: str,
    softcap: float | None,
    z_loss: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `reference.cross_entropy`, with the logits of `chunk` tokens of a device at a time.

    On a mesh each device scores its own tokens. A head that is cut over its width is gathered once,
    and its gradient summed and scattered once; of a vocabulary that is cut, each device scores its
    part, and three numbers a token are exchanged (Shoeybi et al. 2019, section 3).

    Raises:
      ValueError: a sharding that this cannot follow.
    """
    static = _Static(head_dims, softcap, z_loss, chunk)
    return _cross_entropy(static, x_BTD, head, targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, x_BTD, head, targets_BT, weights_BT):
    terms = _on_each_device(_score, static, x_BTD, head, targets_BT, weights_BT)
    return _objective(static, weights_BT, *terms)


def _objective(static, weights_BT, cross_entropy_BT, log_z_BT):
    losses_BT = cross_entropy_BT + static.z_loss * jnp.square(log_z_BT)
    return jnp.sum(weights_BT * losses_BT), cross_entropy_BT, log_z_BT


def _forward(static, *primals):
    x_BTD, head, targets_BT, weights_BT = (primal.value for primal in primals)
    *terms, dx_BTD, dhead = _on_each_device(
        _score_and_differentiate, static, x_BTD, head, targets_BT, weights_BT
    )
    results = _objective(static, weights_BT, *terms)
    return results, (dx_BTD, dhead, *terms)


def _backward(static, residuals, cotangents):
    dx_BTD, dhead, cross_entropy_BT, log_z_BT = residuals
    scale, *others = cotangents
    if not all(isinstance(x, jax.custom_derivatives.SymbolicZero) for x in others):
        raise ValueError(
            "cross-entropy 'chunked' has made the gradient of the objective alone, and that of a"
            " token's cross_entropy or log_z is asked for; use 'reference'"
        )

    def scaled(x):
        return (scale * x.astype(jnp.float32)).astype(x.dtype)

    no_gradient = np.zeros(cross_entropy_BT.shape, jax.dtypes.float0)
    losses_BT = cross_entropy_BT + static.z_loss * jnp.square(log_z_BT)
    return scaled(dx_BTD), scaled(dhead), no_gradient, scaled(losses_BT)


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_each_device(local, static, x_BTD, head, targets_BT, weights_BT):
    """Runs `local` where the tokens lie; a mesh of which nothing is cut needs no `shard_map`."""
    x_spec = (*jax.typeof(x_BTD).sharding.spec, *(None,) * 3)[:3]
    head_spec = (*jax.typeof(head).sharding.spec, *(None,) * 2)[:2]
    if not any(x_spec) and not any(head_spec):
        return local(static, _Axis(), x_BTD, head, targets_BT, weights_BT)
    of_head = dict(zip(static.head_dims, head_spec))
    axes = _Axis(_cut(*x_spec[:2]), _cut(of_head["V"]), _cut(of_head["D"]))
    _check_axes(axes, x_spec, head_spec)
    tokens = PartitionSpec(*x_spec[:2])
    out_specs = (tokens, tokens)
    if local is _score_and_differentiate:
        out_specs += (PartitionSpec(*x_spec), PartitionSpec(*head_spec))
    run = jax.shard_map(
        functools.partial(local, static, axes), out_specs=out_specs, check_vma=False
    )
    targets_BT, weights_BT = (jax.sharding.reshard(x, tokens) for x in (targets_BT, weights_BT))
    return run(x_BTD, head, targets_BT, weights_BT)


def _cut(*entries: str | Sequence[str] | None) -> _Axes:
    """Returns the axes in entries of a spec that have more than one device."""
    names = []
    for entry in entries:
        names += [entry] if isinstance(entry, str) else entry or ()
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(name for name in names if sizes[name] > 1)


def _check_axes(axes: _Axis, x_spec, head_spec) -> None:
    if _cut(x_spec[2]):
        raise ValueError(f"cross-entropy 'chunked' needs whole hidden states, they are {x_spec}")
    if set(axes.vocabulary) & set(axes.tokens) or set(axes.width) - set(axes.tokens):
        raise ValueError(
            f"cross-entropy 'chunked' takes a head whose vocabulary is cut over other mesh axes than"
            f" the tokens, and whose width over the same; tokens are {x_spec}, the head {head_spec}"
        )


# --- one device -------------------------------------------------------------------------------


def _score(static, axes, x_BTD, head, targets_BT, weights_BT):
    """Returns cross-entropies and logsumexps."""
    del weights_BT
    head = _whole(static, axes, head, x_BTD.dtype)

    def score(_, chunk):
        _, _, _, cross_entropy_N, log_z_N = _terms(static, axes, head, *chunk)
        return None, (cross_entropy_N, log_z_N)

    _, terms = jax.lax.scan(score, None, _chunks(static, x_BTD, targets_BT))
    return tuple(_join(term, targets_BT.shape) for term in terms)


def _score_and_differentiate(static, axes, x_BTD, head, targets_BT, weights_BT):
    """Returns cross-entropies and logsumexps, and the gradients of states and head."""
    whole = _whole(static, axes, head, x_BTD.dtype)

    def step(dhead, chunk):
        x_ND, targets_N, weights_N = chunk
        logits_NV, is_target_NV, stats, *terms = _terms(static, axes, whole, x_ND, targets_N)
        slopes_NV = _slopes(static, logits_NV, is_target_NV, *stats, terms[1])
        slopes_NV = slopes_NV.astype(x_ND.dtype)
        scale_N1 = (weights_N / stats[1])[:, None]
        V_and_D = static.head_dims
        dx_ND = scale_N1 * _product(f"NV,{V_and_D}->ND", slopes_NV, whole)
        scaled_ND = (scale_N1 * x_ND).astype(x_ND.dtype)
        dhead = dhead + _product(f"NV,ND->{V_and_D}", slopes_NV, scaled_ND)
        return dhead, (*terms, dx_ND.astype(x_ND.dtype))

    zeros = jnp.zeros(whole.shape, jnp.float32)
    chunks = _chunks(static, x_BTD, targets_BT, weights_BT)
    dhead, (*terms, dx) = jax.lax.scan(step, zeros, chunks)
    dx_BTD = _join(dx, x_BTD.shape)
    if axes.vocabulary:
        dx_BTD = jax.lax.psum(dx_BTD, axes.vocabulary)
    dhead = _summed(static, axes, dhead, x_BTD.dtype).astype(head.dtype)
    return *(_join(term, targets_BT.shape) for term in terms), dx_BTD, dhead


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _terms(static, axes, head, x_ND, targets_N):
    """Returns a chunk's logits, where its targets are, row statistics, cross-entropy and logsumexp.

    The statistics are the largest logit of a row and the sum of exponentials below it, over the
    whole vocabulary, as is the rest but for the logits and targets.
    """
    logits_NV = _product(f"ND,{static.head_dims}->NV", x_ND, head)
    if static.softcap is not None:
        logits_NV = static.softcap * jnp.tanh(logits_NV / static.softcap)
    num_ids = logits_NV.shape[1]
    first = jax.lax.axis_index(axes.vocabulary) * num_ids if axes.vocabulary else 0
    is_target_NV = (targets_N - first)[:, None] == jnp.arange(num_ids)
    max_N = jnp.max(logits_NV, axis=-1)
    sum_N = jnp.sum(jnp.exp(logits_NV - max_N[:, None]), axis=-1)
    target_N = jnp.sum(jnp.where(is_target_NV, logits_NV, 0.0), axis=-1)
    if axes.vocabulary:
        # One exchange a chunk: of the parts' own maxima, and of sums below those.
        parts = jax.lax.all_gather(jnp.stack([max_N, sum_N, target_N]), axes.vocabulary)
        max_N = jnp.max(parts[:, 0], axis=0)
        sum_N = jnp.sum(parts[:, 1] * jnp.exp(parts[:, 0] - max_N), axis=0)
        target_N = jnp.sum(parts[:, 2], axis=0)
    log_z_N = max_N + jnp.log(sum_N)
    return logits_NV, is_target_NV, (max_N, sum_N), log_z_N - target_N, log_z_N


def _slopes(static, logits_NV, is_target_NV, max_N, sum_N, log_z_N):
    """Returns the gradient of a row's loss by its logits, times the row's `sum`.

    With `p = exp(logit - max) / sum` it is `p * (1 + 2 z_loss log_z) - is_target`. The division and
    the weight, of rows, wait until after the products: only what differs within a row is rounded.
    The difference is taken before rounding, so that a target near certainty loses nothing.
    """
    slopes_NV = jnp.exp(logits_NV - max_N[:, None])
    if static.z_loss:
        slopes_NV = slopes_NV * (1.0 + 2.0 * static.z_loss * log_z_N)[:, None]
    slopes_NV = slopes_NV - jnp.where(is_target_NV, sum_N[:, None], 0.0)
    if static.softcap is not None:
        slopes_NV = slopes_NV * (1.0 - jnp.square(logits_NV / static.softcap))
    return slopes_NV


def _chunks(static, *arrays):
    """Cuts [B, T, ...] into [chunks, tokens, ...] of equal length, the last ones padded by zeros."""
    num_tokens = arrays[0].shape[0] * arrays[0].shape[1]
    num_chunks = -(-num_tokens // static.chunk)
    length = -(-num_tokens // num_chunks)

    def cut(array):
        array = array.reshape(num_tokens, *array.shape[2:])
        missing = num_chunks * length - num_tokens
        array = jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
        return array.reshape(num_chunks, length, *array.shape[1:])

    return tuple(cut(array) for array in arrays)


def _join(chunks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `_chunks`."""
    flat = chunks.reshape(-1, *chunks.shape[2:])
    return flat[: shape[0] * shape[1]].reshape(shape)


def _whole(static, axes, head, dtype):
    """Returns the head in `dtype`, its width gathered from where it is cut."""
    head = head.astype(dtype)
    if not axes.width:
        return head
    dim = static.head_dims.index("D")
    return jax.lax.all_gather(head, axes.width, axis=dim, tiled=True)


def _summed(static, axes, dhead, dtype):
    """Returns the head's gradient summed over the devices' tokens, cut as the head is.

    It travels in the compute dtype, as those of all other parameters do.
    """
    if not axes.tokens:
        return dhead
    dhead = dhead.astype(dtype)
    if axes.width:
        dim = static.head_dims.index("D")
        dhead = jax.lax.psum_scatter(dhead, axes.width, scatter_dimension=dim, tiled=True)
    rest = tuple(name for name in axes.tokens if name not in axes.width)
    return jax.lax.psum(dhead, rest) if rest else dhead
