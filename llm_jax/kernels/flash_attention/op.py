"""One signature for every implementation of attention."""

import functools
import logging
from typing import Any

import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from llm_jax.kernels import placement
from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import blocks as blocks_lib
from llm_jax.kernels.flash_attention import chunked
from llm_jax.kernels.flash_attention import devices
from llm_jax.kernels.flash_attention import dropout as dropout_lib
from llm_jax.kernels.flash_attention import jax_nn
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import pallas
from llm_jax.kernels.flash_attention import pieces
from llm_jax.kernels.flash_attention import reference
from llm_jax.kernels.flash_attention import ring

_LOG = logging.getLogger(__name__)


def attention(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    mask: masks.Mask | pallas.Prepared,
    scale: float,
    implementation: str,
    chunk: int,
    q_offset: jax.Array | int = 0,
    softcap: float | None = None,
    bias: biases.Bias | None = None,
    sinks_KG: jax.Array | None = None,
    dropout: dropout_lib.Dropout | None = None,
    blocks: blocks_lib.Blocks | None = None,
    context: str = "gather",
) -> jax.Array:
    """Attends by the named implementation; arguments and result as `reference.attention`.

    `auto` takes `pallas` on TPUs where the kernels take the arguments (`pallas.refusal`), cuDNN by
    `jax_nn` on GPUs where that takes them; else `chunked` for more queries than one chunk holds (the
    scores would weigh more than the rest of the layer), and `reference` below. The log says what it
    took. `pallas` runs TPU kernels for the devices of the mesh that is set, and interprets them on a
    CPU; `blocks` overrides its table.

    Of a sequence that is cut over devices each attends with its own queries. With `gather` it has all
    keys for them; with `ring` the keys go around, and all that belongs to queries and keys is in the order
    of `ring.zigzag` (`reference` is then what `chunked` is).

    A mask that is data may come with the tables of the kernels, made by `prepare` once for all layers.
    The result is named `attention_output`, for remat policies.

    Raises:
      ValueError: shapes that do not fit each other, or an unknown implementation.
    """
    _check_shapes(q_BTKGC, k_BSKC, v_BSKC, bias, sinks_KG)
    prepared = mask if isinstance(mask, pallas.Prepared) else None
    others = {"mask": prepared.mask if prepared else mask, "bias": bias, "sinks_KG": sinks_KG}
    length_axes = devices.axes_of(q_BTKGC).length
    is_ring = context == "ring" and placement.is_cut(length_axes)
    placed = placement.like_queries(others, q_BTKGC, length_axes if is_ring else None)
    mask, bias, sinks_KG = (placed[name] for name in others)
    how = {"softcap": softcap, "bias": bias, "sinks_KG": sinks_KG, "dropout": dropout}
    device_kind = placement.device_kind()
    if implementation == "auto":
        implementation = _choose(q_BTKGC, v_BSKC, chunk, device_kind, **how)
        _say(implementation, q_BTKGC.shape[1], device_kind)
    how |= {"mask": mask, "scale": scale, "q_offset": q_offset}
    if is_ring:
        piece = _piece(implementation, q_BTKGC, v_BSKC, bias, chunk, device_kind, blocks)
        return ring.attention(q_BTKGC, k_BSKC, v_BSKC, piece=piece, chunk=chunk, **how)
    plain = {
        "reference": reference.attention,
        "chunked": functools.partial(chunked.attention, chunk=chunk),
        "jax_nn": functools.partial(jax_nn.attention, device_kind=device_kind),
    }
    if implementation in plain:
        y_BTKGC = plain[implementation](q_BTKGC, k_BSKC, v_BSKC, **how)
        return ad_checkpoint.checkpoint_name(y_BTKGC, "attention_output")
    if implementation == "pallas":
        how["mask"] = prepared or mask
        return pallas.attention(
            q_BTKGC, k_BSKC, v_BSKC, chunk=chunk, device_kind=device_kind, blocks=blocks, **how
        )
    raise ValueError(
        f"attention implementation {implementation!r} is none of"
        " auto, reference, chunked, jax_nn, pallas"
    )


def weights(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    *,
    mask: masks.Mask | pallas.Prepared,
    scale: float,
    softcap: float | None = None,
    bias: biases.Bias | None = None,
) -> jax.Array:
    """Returns what `attention` sums values by, float32 [B, K, G, T, S], to be looked at.

    Whole, by the reference, whatever implementation attends; arguments as of `attention`.
    """
    placed = _for_reference(q_BTKGC, k_BSKC, mask, bias)
    return reference.weights(q_BTKGC, k_BSKC, scale=scale, softcap=softcap, **placed)


def largest_score(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    *,
    mask: masks.Mask | pallas.Prepared,
    scale: float,
    softcap: float | None = None,
    bias: biases.Bias | None = None,
) -> jax.Array:
    """Returns the largest score of a key that a query sees, scaled and capped; arguments as of `weights`."""
    placed = _for_reference(q_BTKGC, k_BSKC, mask, bias)
    scores_BKGTS, allowed_B11TS = reference.scores(
        q_BTKGC, k_BSKC, scale=scale, softcap=softcap, **placed
    )
    return jnp.max(jnp.where(allowed_B11TS, scores_BKGTS, -jnp.inf))


def _for_reference(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    mask: masks.Mask | pallas.Prepared,
    bias: biases.Bias | None,
) -> dict[str, Any]:
    """Returns a mask and a bias where the queries lie."""
    _check_shapes(q_BTKGC, k_BSKC, k_BSKC, bias, None)
    others = {"mask": mask.mask if isinstance(mask, pallas.Prepared) else mask, "bias": bias}
    return placement.like_queries(others, q_BTKGC)


def _piece(
    implementation: str,
    q_BTKGC: jax.Array,
    v_BSKC: jax.Array,
    bias: biases.Bias | None,
    chunk: int,
    device_kind: str,
    blocks: blocks_lib.Blocks | None,
) -> pieces.Piece:
    """Returns what attends on each device of a ring."""
    if implementation in ("reference", "chunked"):
        return pieces.Chunked(chunk)
    if implementation != "pallas":
        raise ValueError(
            f"attention {implementation!r} has no ring: it gives no logsumexp; use 'pallas' or 'chunked'"
        )
    blocks = blocks or blocks_lib.for_device(device_kind, q_BTKGC.shape[-1], q_BTKGC.shape[1])
    reason = pallas.refusal(q_BTKGC, v_BSKC, bias, blocks)
    if reason is not None:
        raise ValueError(f"attention 'pallas' {reason}; use 'chunked'")
    return pieces.Kernels(blocks, device_kind == "cpu")


def prepare(
    mask: masks.Mask,
    like_BT: jax.Array,
    *,
    num_keys: int,
    widths: tuple[int, int],
    group: int,
    dtype: jax.typing.DTypeLike,
    implementation: str,
    bias: biases.Bias | None = None,
    blocks: blocks_lib.Blocks | None = None,
) -> masks.Mask | pallas.Prepared:
    """Returns what many layers may be given for a mask: `pallas.prepare` where `attention` would take
    the kernels, else the mask as it is."""
    device_kind = placement.device_kind()
    is_tpu = device_kind.startswith("TPU") and blocks_lib.is_known(device_kind)
    is_taken = implementation == "pallas" or (implementation == "auto" and is_tpu)
    spec = (*jax.typeof(like_BT).sharding.spec, None, None)
    if not is_taken or placement.is_cut(spec[1]):
        return mask
    how = {"num_keys": num_keys, "widths": widths, "group": group, "dtype": dtype}
    return pallas.prepare(mask, like_BT, device_kind=device_kind, bias=bias, blocks=blocks, **how)


def _choose(
    q_BTKGC: jax.Array,
    v_BSKC: jax.Array,
    chunk: int,
    device_kind: str,
    *,
    softcap: float | None,
    bias: biases.Bias | None,
    sinks_KG: jax.Array | None,
    dropout: dropout_lib.Dropout | None,
) -> str:
    is_library = jax_nn.refusal(q_BTKGC, v_BSKC, softcap, sinks_KG, dropout) is None
    is_library = is_library and jax_nn.has_cudnn(q_BTKGC, v_BSKC, bias, device_kind)
    # Nobody has run the library's kernel on parts of an array.
    if is_library and not any(map(placement.is_cut, jax.typeof(q_BTKGC).sharding.spec)):
        return "jax_nn"
    if device_kind.startswith("TPU") and blocks_lib.is_known(device_kind):
        blocks = blocks_lib.for_device(device_kind, q_BTKGC.shape[-1], q_BTKGC.shape[1])
        if pallas.refusal(q_BTKGC, v_BSKC, bias, blocks) is None:
            return "pallas"
    return "chunked" if q_BTKGC.shape[1] > chunk else "reference"


@functools.cache
def _say(implementation: str, num_queries: int, device_kind: str) -> None:
    """Logs a choice once, however many layers make it."""
    _LOG.info("attention of %d queries on %s: %s", num_queries, device_kind, implementation)


def _check_shapes(
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    bias: biases.Bias | None,
    sinks_KG: jax.Array | None,
) -> None:
    q, k, v = q_BTKGC.shape, k_BSKC.shape, v_BSKC.shape
    if len(q) != 5 or len(k) != 4 or k[:3] != v[:3] or (q[0], q[2], q[4]) != (k[0], k[2], k[3]):
        raise ValueError(f"q [B,T,K,G,C] = {q}, k and v [B,S,K,C] = {k}, {v} do not fit together")
    wanted = (q[0], q[2], q[3], q[1], k[1])
    if isinstance(bias, biases.Full):
        shape = bias.bias_BKGTS.shape
        is_fit = len(shape) == 5 and all(a in (1, b) for a, b in zip(shape[:3], wanted))
        if not is_fit or shape[3:] != wanted[3:]:
            raise ValueError(f"bias [B,K,G,T,S] = {shape} does not fit [B,K,G,T,S] = {wanted}")
    heads = {"sinks [K,G]": sinks_KG}
    if isinstance(bias, biases.Alibi):
        heads["ALiBi slopes [K,G]"] = bias.slopes_KG
    if isinstance(bias, biases.Relative):
        heads["buckets [K,G,U]"] = bias.table_KGU
    for name, array in heads.items():
        if array is not None and array.shape[:2] != wanted[1:3]:
            raise ValueError(f"{name} = {array.shape} does not fit heads [K,G] = {wanted[1:3]}")
