"""One signature for every implementation of the cross-entropy of an output head."""

import functools
import logging
from typing import NamedTuple

import jax

from llm_jax.kernels import placement
from llm_jax.kernels.cross_entropy import chunked
from llm_jax.kernels.cross_entropy import devices
from llm_jax.kernels.cross_entropy import kernels
from llm_jax.kernels.cross_entropy import pallas
from llm_jax.kernels.cross_entropy import reference

_LOG = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "reference", "chunked", "pallas")

# Float32 logits of a device, bytes: an eighth of the smallest TPU memory in use (v5e). Below it whole
# logits are the faster ones on one chip, by 1 to 30% of this operation (modelled).
_LARGEST_WHOLE = 2 << 30

# Where the kernels are faster than chunks, by modelled time (v5e: they are not; others: not searched).
_FASTER_BY_KERNELS = ("TPU v6 lite",)


class TokenLosses(NamedTuple):
    """Losses of tokens, float32.

    Attributes:
      objective: scalar, the sum of weights * (cross_entropy + z_loss * log_z^2). The gradients of
        the others are the reference's alone: `chunked` refuses to give them.
      cross_entropy_BT: of the targets, in nats.
      log_z_BT: the logsumexp of a token's logits.
    """

    objective: jax.Array
    cross_entropy_BT: jax.Array
    log_z_BT: jax.Array


def cross_entropy(
    x_BTD: jax.Array,
    head: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    head_dims: str,
    implementation: str,
    chunk: int,
    softcap: float | None = None,
    z_loss: float = 0.0,
    bias_V: jax.Array | None = None,
    blocks: kernels.Blocks | None = None,
) -> TokenLosses:
    """Scores targets with `softmax(softcap(x @ head))` by the named implementation.

    `reference` holds all logits, `chunked` those of `chunk` tokens of a device, `pallas`, kernels for
    TPUs, none. `auto` takes `reference` up to 2 GiB of float32 logits a device; above, `pallas` on a
    v6e and `chunked` elsewhere. The log says what it took. `pallas` is for the devices of the mesh
    that is set, and is interpreted on a CPU; `blocks` overrides its sizes.

    Args:
      x_BTD: hidden states, in the compute dtype: products are of this dtype, sums are float32.
      head: [V, D] or [D, V], in any float dtype.
      targets_BT: int32 ids in [0, V).
      weights_BT: float32, 0 where a token does not count.
      head_dims: `VD` or `DV`.
      chunk: tokens of a device whose logits exist at a time.
      softcap: logits are capped to +-this by tanh; None: they are not.
      z_loss: weight of the squared logsumexp (Chowdhery et al. 2022, section 5).
      bias_V: of the logits (BERT); for `reference`, which `auto` takes then.

    Raises:
      ValueError: shapes that do not fit each other, an unknown implementation, or a sharding that
        it does not take.
    """
    _check(x_BTD, head, targets_BT, weights_BT, head_dims, chunk)
    device_kind = placement.device_kind()
    if bias_V is not None:
        if implementation not in ("auto", "reference"):
            raise ValueError(
                f"cross-entropy {implementation!r} takes no bias of the vocabulary, {bias_V.shape}; use"
                " 'auto' or 'reference', or a head without (model.use_head_bias = False)"
            )
        implementation = "reference"
    if implementation == "auto":
        implementation = _choose(x_BTD, head, head_dims, chunk, device_kind)
    how = {"head_dims": head_dims, "softcap": softcap, "z_loss": z_loss}
    arrays = (x_BTD, head, targets_BT, weights_BT)
    if implementation == "reference":
        return TokenLosses(*reference.cross_entropy(*arrays, bias_V=bias_V, **how))
    if implementation == "chunked":
        return TokenLosses(*devices.cross_entropy(chunked.Chunked(chunk=chunk, **how), *arrays))
    if implementation == "pallas":
        local = pallas.Pallas(blocks=blocks, is_interpreted=device_kind == "cpu", **how)
        return TokenLosses(*devices.cross_entropy(local, *arrays))
    raise ValueError(
        f"cross-entropy implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}"
    )


def _choose(x_BTD: jax.Array, head: jax.Array, head_dims: str, chunk: int, device_kind: str) -> str:
    tokens = jax.typeof(x_BTD).sharding.shard_shape(x_BTD.shape)
    num_tokens = tokens[0] * tokens[1]
    num_ids = jax.typeof(head).sharding.shard_shape(head.shape)[head_dims.index("V")]
    num_bytes = 4 * num_tokens * num_ids
    implementation = "reference"
    if num_tokens > chunk and num_bytes > _LARGEST_WHOLE:
        implementation = "pallas" if device_kind in _FASTER_BY_KERNELS else "chunked"
    _say(implementation, num_tokens, num_ids, num_bytes >> 20)
    return implementation


@functools.cache
def _say(implementation: str, num_tokens: int, num_ids: int, mebibytes: int) -> None:
    """Logs a choice once."""
    _LOG.info(
        "cross-entropy of %d tokens over %d ids a device (%d MiB of logits): %s",
        *(num_tokens, num_ids, mebibytes, implementation),
    )


def _check(x_BTD, head, targets_BT, weights_BT, head_dims, chunk) -> None:
    if head_dims not in ("VD", "DV"):
        raise ValueError(f"head_dims = {head_dims!r}: use 'VD' or 'DV'")
    is_fit = x_BTD.ndim == 3 and head.ndim == 2
    if not is_fit or head.shape[head_dims.index("D")] != x_BTD.shape[2]:
        raise ValueError(
            f"states [B,T,D] = {x_BTD.shape} do not fit a head [{','.join(head_dims)}] ="
            f" {head.shape}"
        )
    for name, array in (("targets", targets_BT), ("weights", weights_BT)):
        if array.shape != x_BTD.shape[:2]:
            raise ValueError(
                f"{name} [B,T] = {array.shape} do not fit states [B,T,D] = {x_BTD.shape}"
            )
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}: use 1 token or more")
