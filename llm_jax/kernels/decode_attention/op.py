"""One signature for attention to a cache, in the layout that the cache has."""

from collections.abc import Callable
import functools
import logging

import jax
import jax.numpy as jnp

from llm_jax.kernels import few_rows
from llm_jax.kernels import placement
from llm_jax.kernels.decode_attention import caches
from llm_jax.kernels.decode_attention import few_queries
from llm_jax.kernels.decode_attention import paged
from llm_jax.kernels.decode_attention import pallas
from llm_jax.kernels.decode_attention import reference
from llm_jax.kernels.decode_attention import single_query
from llm_jax.kernels.flash_attention import biases

_LOG = logging.getLogger(__name__)

Cache = caches.SlotsLast | caches.OfBeams | caches.Contiguous | caches.ValuesInKeys | paged.Paged


def make_cache(
    batch_size: int,
    num_heads: int,
    *,
    num_slots: int,
    width: int,
    dtype: jax.typing.DTypeLike,
    row_axes: placement.Axes = None,
    head_axes: placement.Axes = None,
    bias: type[biases.Bias] | None = None,
    implementation: str = "auto",
) -> caches.SlotsLast | caches.Contiguous:
    """Returns an empty cache in the layout that suits what will attend to it.

    Args:
      batch_size, num_heads, num_slots, width: B, K, S and C. A `Contiguous` cache has its slots rounded
        up to what one copy of the kernel takes.
      dtype: of keys and values; int8, which rounds them, for `pallas` alone.
      row_axes, head_axes: of the mesh that is set, which rows and heads are cut over.
      bias: the kind of bias that attention to the cache will add; None: none.
      implementation: `pallas` makes a `Contiguous` cache, and so does `auto` on TPUs where the kernel
        takes it; every other name of `config.model.attention` a `SlotsLast`, and so do all with a bias
        that the kernel does not take.

    Raises:
      ValueError: int8 where the kernel is not asked for, or not at hand.
    """
    local_heads = num_heads // placement.num_parts(head_axes)
    slots = -(-num_slots // pallas.SLOTS) * pallas.SLOTS
    device_kind = placement.device_kind()
    is_taken = implementation == "pallas" or (
        implementation == "auto"
        and device_kind.startswith("TPU")
        and pallas.layout_refusal(local_heads, width, slots, dtype, device_kind) is None
    )
    if is_taken and pallas.bias_refusal(bias) is None:
        return caches.make_contiguous(
            batch_size, num_heads, slots, width, dtype, row_axes, head_axes
        )
    if jnp.dtype(dtype) == jnp.int8:
        raise ValueError(
            f"an int8 cache is for the kernel: [B,K,S,C] = {(batch_size, num_heads, slots, width)} on"
            f" {device_kind} with implementation {implementation!r} has none; use 'pallas'"
        )
    return caches.make_slots_last(
        batch_size, num_heads, num_slots, width, dtype, row_axes, head_axes
    )


def attention(
    q_BTKGC: jax.Array,
    cache: Cache,
    *,
    lengths_B: jax.Array,
    scale: float,
    starts_B: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    bias: biases.Alibi | biases.Relative | None = None,
    sinks_KG: jax.Array | None = None,
    is_causal: bool = True,
    implementation: str = "auto",
    sizes: pallas.Sizes | None = None,
) -> jax.Array:
    """Attends with each row's newest queries to its keys and values; forward only.

    Row b holds the slots from `starts_B[b]` up to `lengths_B[b]`, and query i of T is at slot
    `lengths_B[b] - T + i`: the cache is written up to the last query. A query sees its own slot and
    those before. Without `is_causal` it has no slot and sees all of its row, as a decoder's queries do
    the keys of its encoder's tokens.

    Args:
      q_BTKGC: the queries, one a row or a few (speculative decoding; beams that share an encoder's row).
      cache: keys and values; what lies outside of a row may be anything finite, for `pallas` anything.
      lengths_B: int32, of each row, with what lies before its first slot; at most the cache's slots.
      scale: factor of the scores, commonly C**-0.5.
      starts_B: int32, first slot of each row (prompts padded on the left); None: 0.
      window: a query sees this many slots, its own among them; None: all.
      softcap: scores become `softcap * tanh(scores / softcap)`.
      bias: added to the scores after that; any that goes by distance. `pallas` takes slopes alone.
      sinks_KG: float32 logits that join the softmax and attend to nothing.
      is_causal: whether a query sees no slot after its own; if not, there is neither window nor bias.
      implementation: `auto`, `reference`, `single_query` (T = 1, of a `SlotsLast`), `few_queries` (of a
        `SlotsLast`) or `pallas` (of a `Contiguous` or `Paged`; on a CPU interpreted). `auto` takes
        `pallas` on TPUs where the kernel takes the arguments, `few_queries` where `few_rows` are fast,
        `single_query` where it can, and else the reference; the log says what it took. A `ValuesInKeys` has the reference alone: the kernel reads values as wide as keys.
      sizes: how `pallas` cuts the work, instead of its table.

    Returns:
      [B, T, K, G, C] in the dtype of `q_BTKGC`, C of the values; zeros for a query that sees nothing.

    Raises:
      ValueError: shapes that do not fit each other, or an implementation that does not take them.
    """
    _check_shapes(q_BTKGC, cache)
    _check_others(q_BTKGC.shape, lengths_B, starts_B, window, bias, sinks_KG, is_causal)
    if starts_B is None:
        starts_B = jnp.zeros_like(lengths_B)
    others = {"lengths_B": lengths_B, "starts_B": starts_B, "bias": bias, "sinks_KG": sinks_KG}
    how = placement.like_queries(others, q_BTKGC)
    how |= {"scale": scale, "window": window, "softcap": softcap, "is_causal": is_causal}
    device_kind = placement.device_kind()
    if implementation == "auto":
        implementation = _choose(q_BTKGC, cache, device_kind, bias)
        _say(implementation, q_BTKGC.shape[1], device_kind, type(cache).__name__)
    if implementation == "pallas":
        how |= {"device_kind": device_kind, "sizes": sizes}
    return _implementation(implementation, q_BTKGC, cache)(q_BTKGC, **how)


def _implementation(name: str, q_BTKGC: jax.Array, cache: Cache) -> Callable[..., jax.Array]:
    """Returns the named implementation around a cache that it takes."""
    is_slots_last = isinstance(cache, caches.SlotsLast)
    if name == "pallas" and isinstance(cache, caches.ValuesInKeys):
        raise ValueError(
            "decode attention 'pallas' reads values beside keys and as wide, no ValuesInKeys: k [B,S,C] ="
            f" {cache.k_BSC.shape} of which {cache.num_values} are values; use 'auto' or 'reference'"
        )
    if name == "pallas":
        if is_slots_last:
            raise ValueError(
                "decode attention 'pallas' reads a Contiguous or Paged cache, not SlotsLast:"
                f" k [B,K,C,S] = {cache.k_BKCS.shape}"
            )
        return lambda q, **how: pallas.attention(q, cache, **how)
    if name == "reference" and isinstance(cache, caches.ValuesInKeys):
        # Whole keys are summed, and what is no value of it dropped: a slice of them would be copied.
        k_BSKC, _ = cache.dense()
        values = slice(cache.num_values)
        return lambda q, **how: reference.attention(q, k_BSKC, k_BSKC, **how)[..., values]
    if name == "reference":
        return lambda q, **how: reference.attention(q, *cache.dense(), **how)
    if name == "single_query":
        if not is_slots_last or q_BTKGC.shape[1] != 1:
            raise ValueError(
                "decode attention 'single_query' takes one query and a SlotsLast cache, not"
                f" q [B,T,K,G,C] = {q_BTKGC.shape} and {type(cache).__name__}"
            )
        return lambda q, **how: single_query.attention(q, cache.k_BKCS, cache.v_BKSC, **how)
    if name == "few_queries" and isinstance(cache, caches.OfBeams):
        return lambda q, **how: few_queries.attention_of_beams(q, cache, **how)
    if name == "few_queries":
        if not is_slots_last:
            raise ValueError(
                "decode attention 'few_queries' takes a SlotsLast cache, or one OfBeams, not"
                f" {type(cache).__name__}"
            )
        return lambda q, **how: few_queries.attention(q, cache.k_BKCS, cache.v_BKSC, **how)
    raise ValueError(
        f"decode attention implementation {name!r} is none of auto, reference, single_query, few_queries,"
        " pallas"
    )


def _choose(q_BTKGC: jax.Array, cache: Cache, device_kind: str, bias: biases.Bias | None) -> str:
    if isinstance(cache, caches.SlotsLast):
        if cache.k_BKCS.dtype == q_BTKGC.dtype and few_rows.are_fast(q_BTKGC.dtype):
            return "few_queries"
        return "single_query" if q_BTKGC.shape[1] == 1 else "reference"
    if isinstance(cache, caches.OfBeams):
        return "few_queries"
    if isinstance(cache, caches.ValuesInKeys):
        return "reference"
    is_tpu = device_kind.startswith("TPU")
    if is_tpu and pallas.refusal(q_BTKGC, cache, device_kind, bias) is None:
        return "pallas"
    return "reference"


@functools.cache
def _say(implementation: str, num_queries: int, device_kind: str, layout: str) -> None:
    """Logs a choice once, however many layers make it."""
    _LOG.info(
        "attention of %d queries to a cache (%s) on %s: %s",
        num_queries,
        layout,
        device_kind,
        implementation,
    )


def _check_shapes(q_BTKGC: jax.Array, cache: Cache) -> None:
    q = q_BTKGC.shape
    if len(q) != 5:
        raise ValueError(f"queries must be [B,T,K,G,C], got {q}")
    B, T, K, G, C = q
    if isinstance(cache, caches.OfBeams):
        origins = cache.origins_BQS.shape
        if T != 1 or origins[0] * origins[1] != B or origins[2] != cache.num_slots:
            raise ValueError(
                f"q [B*Q,T,K,G,C] = {q}, of one token each, and origins [B,Q,S] = {origins} of a cache of"
                f" {cache.num_slots} slots do not fit"
            )
        cache = cache.own
    if isinstance(cache, caches.SlotsLast):
        k, v = cache.k_BKCS.shape, cache.v_BKSC.shape
        if k[:3] != (B, K, C) or v != (B, K, k[3], C):
            raise ValueError(
                f"q [B,T,K,G,C] = {q}, k [B,K,C,S] = {k}, v [B,K,S,C] = {v} do not fit"
            )
    elif isinstance(cache, caches.ValuesInKeys):
        k = cache.k_BSC.shape
        if K != 1 or k[::2] != (B, C) or not 0 < cache.num_values <= C:
            raise ValueError(
                f"q [B,T,K,G,C] = {q} and k [B,S,C] = {k} of one head, of which {cache.num_values} are"
                " values, do not fit"
            )
    elif isinstance(cache, caches.Contiguous):
        kv = cache.kv_B2SW.shape
        if (*kv[:2], *kv[3:]) != (B, 2, K * C) or cache.num_heads != K:
            raise ValueError(
                f"q [B,T,K,G,C] = {q} and kv [B,2,S,K*C] = {kv} of {cache.num_heads} heads do not fit"
            )
    else:
        kv, table = cache.kv_pages.shape, cache.table.shape
        if (kv[1], kv[3], table[0], cache.num_heads) != (2, K * C, B, K):
            raise ValueError(
                f"q [B,T,K,G,C] = {q}, kv_pages [pages,2,slots,K*C] = {kv} of {cache.num_heads}"
                f" heads, table [B,pages of a row] = {table} do not fit"
            )


def _check_others(q, lengths_B, starts_B, window, bias, sinks_KG, is_causal) -> None:
    if not is_causal and not (window is None and bias is None):
        raise ValueError(
            "queries that see their whole row have no slot: attention to a cache without is_causal"
            f" takes neither window = {window} nor a bias of kind {type(bias).__name__}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window = {window} must be at least 1: a query sees its own slot")
    for name, array in (("lengths", lengths_B), ("starts", starts_B)):
        if array is not None and (array.shape != q[:1] or array.dtype != jnp.int32):
            raise ValueError(f"{name} [B] must be int32 {q[:1]}, got {array.dtype} {array.shape}")
    if not isinstance(bias, biases.Alibi | biases.Relative | None):
        raise ValueError(
            f"attention to a cache takes no bias of kind {type(bias).__name__}, only those that go by"
            " distance, Alibi and Relative; or use flash_attention.op with q_offset"
        )
    shapes = {"sinks [K,G]": q[2:4] if sinks_KG is None else sinks_KG.shape}
    if isinstance(bias, biases.Alibi):
        shapes["ALiBi slopes [K,G]"] = bias.slopes_KG.shape
    if isinstance(bias, biases.Relative):
        shapes["heads of a table by distance [K,G]"] = bias.table_KGU.shape[:-1]
    for name, shape in shapes.items():
        if shape != q[2:4]:
            raise ValueError(f"{name} = {shape} do not fit heads [K,G] = {q[2:4]}")
