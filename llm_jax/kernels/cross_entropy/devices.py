"""Cross-entropy on a mesh: what each device scores, and the gradient made beside the loss.

What multiplies the gradient later is one scalar. So it is made in the forward pass, from the logits
that the loss needs anyway.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

Axes = tuple[str, ...]  # of the mesh


class Local(Protocol):
    """An implementation for the tokens of one device. Hashable.

    Both methods take states [N, D], the head at its whole width in the same dtype, ids counted from
    the first of this device's part of the vocabulary, and the mesh axes over which the vocabulary is
    cut; they return cross-entropies and logsumexps, float32 [N], over the whole vocabulary.
    """

    head_dims: str
    z_loss: float

    def score(
        self, x_ND: jax.Array, head: jax.Array, targets_N: jax.Array, axes: Axes
    ) -> tuple[jax.Array, jax.Array]: ...

    def score_and_differentiate(
        self,
        x_ND: jax.Array,
        head: jax.Array,
        targets_N: jax.Array,
        weights_N: jax.Array,
        axes: Axes,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Also returns the gradient of states, from this part of the vocabulary, in their dtype,
        and that of the head, from these tokens, in float32."""
        ...


@dataclasses.dataclass(frozen=True)
class _Cuts:
    """Mesh axes over which the tokens, and the vocabulary and width of the head, are cut."""

    tokens: Axes = ()
    vocabulary: Axes = ()
    width: Axes = ()


def cross_entropy(
    local: Local,
    x_BTD: jax.Array,
    head: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what `reference.cross_entropy` does, by `local` on each device.

    Each device scores its own tokens. A head that is cut over its width is gathered once, and its
    gradient summed and scattered once; of a vocabulary that is cut, each device scores its part
    (Shoeybi et al. 2019, section 3).

    Raises:
      ValueError: a sharding that this cannot follow, or a gradient of a token's loss.
    """
    return _cross_entropy(local, x_BTD, head, targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(local, x_BTD, head, targets_BT, weights_BT):
    terms = _on_each_device(_score, local, x_BTD, head, targets_BT, weights_BT)
    return _objective(local, weights_BT, *terms)


def _objective(local, weights_BT, cross_entropy_BT, log_z_BT):
    losses_BT = cross_entropy_BT + local.z_loss * jnp.square(log_z_BT)
    return jnp.sum(weights_BT * losses_BT), cross_entropy_BT, log_z_BT


def _forward(local, *primals):
    x_BTD, head, targets_BT, weights_BT = (primal.value for primal in primals)
    *terms, dx_BTD, dhead = _on_each_device(
        _score_and_differentiate, local, x_BTD, head, targets_BT, weights_BT
    )
    results = _objective(local, weights_BT, *terms)
    return results, (dx_BTD, dhead, *terms)


def _backward(local, residuals, cotangents):
    dx_BTD, dhead, cross_entropy_BT, log_z_BT = residuals
    scale, *others = cotangents
    if not all(isinstance(x, jax.custom_derivatives.SymbolicZero) for x in others):
        raise ValueError(
            "the gradient of a token's cross_entropy or log_z is asked for, and only the 'reference'"
            " has it: 'chunked' and 'pallas' make that of the objective alone"
        )

    def scaled(x):
        return (scale * x.astype(jnp.float32)).astype(x.dtype)

    no_gradient = np.zeros(cross_entropy_BT.shape, jax.dtypes.float0)
    losses_BT = cross_entropy_BT + local.z_loss * jnp.square(log_z_BT)
    return scaled(dx_BTD), scaled(dhead), no_gradient, scaled(losses_BT)


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_each_device(run, local, x_BTD, head, targets_BT, weights_BT):
    """Calls `run` where the tokens lie; a mesh of which nothing is cut needs no `shard_map`."""
    x_spec = (*jax.typeof(x_BTD).sharding.spec, *(None,) * 3)[:3]
    head_spec = (*jax.typeof(head).sharding.spec, *(None,) * 2)[:2]
    if not any(x_spec) and not any(head_spec):
        return run(local, _Cuts(), x_BTD, head, targets_BT, weights_BT)
    of_head = dict(zip(local.head_dims, head_spec))
    cuts = _Cuts(_cut(*x_spec[:2]), _cut(of_head["V"]), _cut(of_head["D"]))
    _check(cuts, x_spec, head_spec)
    tokens = PartitionSpec(*x_spec[:2])
    out_specs = (tokens, tokens)
    if run is _score_and_differentiate:
        out_specs += (PartitionSpec(*x_spec), PartitionSpec(*head_spec))
    run = jax.shard_map(functools.partial(run, local, cuts), out_specs=out_specs, check_vma=False)
    targets_BT, weights_BT = (jax.sharding.reshard(x, tokens) for x in (targets_BT, weights_BT))
    return run(x_BTD, head, targets_BT, weights_BT)


def _cut(*entries: str | Sequence[str] | None) -> Axes:
    """Returns the axes in entries of a spec that have more than one device."""
    names = []
    for entry in entries:
        names += [entry] if isinstance(entry, str) else entry or ()
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(name for name in names if sizes[name] > 1)


def _check(cuts: _Cuts, x_spec, head_spec) -> None:
    if _cut(x_spec[2]):
        raise ValueError(
            f"cross-entropy needs whole hidden states, they are {x_spec}; use 'reference'"
        )
    if set(cuts.vocabulary) & set(cuts.tokens) or set(cuts.width) - set(cuts.tokens):
        raise ValueError(
            "cross-entropy takes a head whose vocabulary is cut over other mesh axes than the tokens,"
            f" and whose width over the same; tokens are {x_spec}, the head {head_spec}; use"
            " 'reference'"
        )


def _score(local, cuts, x_BTD, head, targets_BT, weights_BT):
    """Returns cross-entropies and logsumexps."""
    del weights_BT
    head, x_ND, targets_N = _prepared(local, cuts, head, x_BTD, targets_BT)
    terms = local.score(x_ND, head, targets_N, cuts.vocabulary)
    return tuple(term_N.reshape(targets_BT.shape) for term_N in terms)


def _score_and_differentiate(local, cuts, x_BTD, head, targets_BT, weights_BT):
    """Returns cross-entropies and logsumexps, and the gradients of states and head."""
    whole, x_ND, targets_N = _prepared(local, cuts, head, x_BTD, targets_BT)
    *terms, dx_ND, dhead = local.score_and_differentiate(
        x_ND, whole, targets_N, weights_BT.reshape(-1), cuts.vocabulary
    )
    dx_BTD = dx_ND.reshape(x_BTD.shape)
    if cuts.vocabulary:
        dx_BTD = jax.lax.psum(dx_BTD, cuts.vocabulary)
    dhead = _summed(local, cuts, dhead, x_BTD.dtype).astype(head.dtype)
    return *(term_N.reshape(targets_BT.shape) for term_N in terms), dx_BTD, dhead


def _prepared(local, cuts, head, x_BTD, targets_BT):
    """Returns the head in the states' dtype, gathered over its width, and tokens in one dimension."""
    head = head.astype(x_BTD.dtype)
    if cuts.width:
        dim = local.head_dims.index("D")
        head = jax.lax.all_gather(head, cuts.width, axis=dim, tiled=True)
    targets_N = targets_BT.reshape(-1)
    if cuts.vocabulary:
        num_ids = head.shape[local.head_dims.index("V")]
        targets_N = targets_N - jax.lax.axis_index(cuts.vocabulary) * num_ids
    return head, x_BTD.reshape(-1, x_BTD.shape[-1]), targets_N


def over_vocabulary(
    max_N: jax.Array, sum_N: jax.Array, target_N: jax.Array, axes: Axes
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the statistics of whole rows from those of this device's part of the vocabulary.

    Args:
      max_N: the largest logit.
      sum_N: of `exp(logit - max)`.
      target_N: the target's logit, 0 where it is on another device.
      axes: of the mesh, over which the vocabulary is cut.
    """
    if not axes:
        return max_N, sum_N, target_N
    # One exchange of three numbers a token; the maxima are the parts' own.
    parts = jax.lax.all_gather(jnp.stack([max_N, sum_N, target_N]), axes)
    max_N = jnp.max(parts[:, 0], axis=0)
    sum_N = jnp.sum(parts[:, 1] * jnp.exp(parts[:, 0] - max_N), axis=0)
    return max_N, sum_N, jnp.sum(parts[:, 2], axis=0)


def _summed(local, cuts, dhead, dtype):
    """Returns the head's gradient summed over the devices' tokens, cut as the head is.

    It travels in the compute dtype, as those of all other parameters do.
    """
    if not cuts.tokens:
        return dhead
    dhead = dhead.astype(dtype)
    if cuts.width:
        dim = local.head_dims.index("D")
        dhead = jax.lax.psum_scatter(dhead, cuts.width, scatter_dimension=dim, tiled=True)
    rest = tuple(name for name in cuts.tokens if name not in cuts.width)
    return jax.lax.psum(dhead, rest) if rest else dhead
