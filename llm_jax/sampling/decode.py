"""Prefill and decode: two jitted programs around one donated cache; before them, the encoder if any."""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import dims
from llm_jax import sharding
from llm_jax.kernels import few_rows
from llm_jax.models import decoder
from llm_jax.models import encoder_decoder
from llm_jax.models import stack
from llm_jax.models import trunk
from llm_jax.sampling import cache as cache_lib
from llm_jax.sampling import samplers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachedModel:
    """A model taken apart for generation: its blocks one by one, its matrices in compute dtype.

    Attributes:
      model: of which all is used but the stack of what generates; that one is empty.
      blocks: the layers of what generates.
    """

    model: decoder.Decoder | encoder_decoder.EncoderDecoder
    blocks: list[stack.Block]

    @property
    def config(self) -> config_lib.ModelConfig:
        return self.model.config

    @property
    def rules(self) -> sharding.AxisRules:
        return self.model.rules

    @property
    def trunk(self) -> trunk.Trunk:
        """What generates: a decoder, or the one that follows an encoder."""
        return trunk_of(self.model)


def trunk_of(model: decoder.Decoder | encoder_decoder.EncoderDecoder) -> trunk.Trunk:
    """Returns what generates of a model."""
    return model.decoder if isinstance(model, encoder_decoder.EncoderDecoder) else model


def prepare_model(model: decoder.Decoder | encoder_decoder.EncoderDecoder) -> CachedModel:
    """Returns the model as generation wants it: cast and taken apart once instead of every token."""
    model = _cast(model)
    blocks = trunk_of(model).stack.unstacked()
    model = _without_layers(model)
    if few_rows.are_fast(model.config.dtype):
        for index, block in enumerate(blocks):
            blocks[index] = _outputs_first(block)
        model = _with_head_for_few_rows(model)
    return CachedModel(model, blocks)


@jax.jit
def _cast(
    model: decoder.Decoder | encoder_decoder.EncoderDecoder,
) -> decoder.Decoder | encoder_decoder.EncoderDecoder:
    def cast(path, leaf):
        # What is computed with in float32 stays: vectors, norms of heads, biases by distance, routers.
        names = {getattr(entry, "name", None) for entry in path}
        is_exact = len(dims.of_path(path)) < 2 or names & {"relative", "q_norm", "k_norm", "router"}
        return leaf if is_exact else leaf.astype(model.config.dtype)

    return jax.tree_util.tree_map_with_path(cast, model)


@jax.jit
def _outputs_first(block: stack.Block) -> stack.Block:
    """Returns the block with matrices that `layers.project` takes turned for products of few rows."""

    def turned(path, leaf):
        letters = dims.of_path(path)
        if len(letters) < 2 or "E" in letters or "D" not in (letters[0], letters[-1]):
            return leaf
        return few_rows.outputs_first(leaf, 1 if letters[0] == "D" else len(letters) - 1)

    return jax.tree_util.tree_map_with_path(turned, block)


def _with_head_for_few_rows(
    model: decoder.Decoder | encoder_decoder.EncoderDecoder,
) -> decoder.Decoder | encoder_decoder.EncoderDecoder:
    """Gives the model a head turned for products of few rows, and returns it."""
    letters, head = model.head()
    if letters == "DV":
        turned = jax.jit(few_rows.outputs_first, static_argnums=1)(head[...], 1)
    else:
        # A tied table lies as wanted already.
        turned = few_rows.OutputsFirst(head[...], head.shape[::-1])
    model.head_DV = nnx.data(nnx.Param(turned))
    return model


@jax.jit
def _without_layers(
    model: decoder.Decoder | encoder_decoder.EncoderDecoder,
) -> decoder.Decoder | encoder_decoder.EncoderDecoder:
    """Returns the model with an empty stack where it generates."""
    prefix = ".decoder.stack." if isinstance(model, encoder_decoder.EncoderDecoder) else ".stack."

    def emptied(path, leaf):
        return leaf[:0] if jax.tree_util.keystr(path).startswith(prefix) else leaf

    return jax.tree_util.tree_map_with_path(emptied, model)


@jax.jit
def encode(model: CachedModel, tokens_BS: jax.Array, lengths_B: jax.Array) -> cache_lib.Encoded:
    """Runs the encoder and what each layer of the decoder reads of it.

    Args:
      model: an encoder-decoder, from `prepare_model`.
      tokens_BS: int32, padded on the right.
      lengths_B: int32, of each row.
    """
    batch_size, length = tokens_BS.shape
    places_BS = jnp.broadcast_to(jnp.arange(length), tokens_BS.shape)
    is_text_BS = places_BS < lengths_B[:, None]
    states_BSD, _ = model.model.encode(
        tokens_BS, jnp.where(is_text_BS, places_BS, 0), is_text_BS.astype(jnp.int32)
    )
    caches = cache_lib.make_cache(model.config, model.rules, batch_size, length, is_of_encoder=True)
    filled = [
        block.cross_attention.remember(states_BSD, cache)
        for block, cache in zip(model.blocks, caches, strict=True)
    ]
    return cache_lib.Encoded(filled, lengths_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What goes from token to token.

    Attributes:
      cache: keys and values.
      encoded: of an encoder; None without.
      last_B: the newest token of each row, not yet in the cache.
      slot: int32 scalar, where `last_B` goes.
      starts_B: first slot of each row's text.
      num_generated: int32 scalar, tokens generated so far.
      keys_B: of each row; token n of a row is drawn with `fold_in(key, n)`.
      is_done_B: rows that have ended.
      is_seen_BV: tokens that each row holds; None without a repetition penalty.
    """

    cache: stack.Cache
    encoded: cache_lib.Encoded | None
    last_B: jax.Array
    slot: jax.Array
    starts_B: jax.Array
    num_generated: jax.Array
    keys_B: jax.Array
    is_done_B: jax.Array
    is_seen_BV: jax.Array | None


def states(
    model: CachedModel,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    slot: jax.Array | int,
    cache: stack.Cache,
    encoded: cache_lib.Encoded | None = None,
) -> tuple[jax.Array, stack.Cache]:
    """Runs tokens at slots from `slot` on; returns the last block's output, [B, T, D]."""
    num_tokens = tokens_BT.shape[1]
    positions_BT = cache_lib.positions(starts_B, num_tokens, slot)
    is_prefill = isinstance(slot, int)
    within = cache_lib.prompt_mask(starts_B, num_tokens) if is_prefill else None
    contexts = model.trunk.contexts(positions_BT, within, slot=slot, starts_B=starts_B)
    if model.config.has_experts("decoder"):
        numbers_BT = cache_lib.text_numbers(starts_B, num_tokens, slot)
        contexts = trunk.with_tokens(contexts, tokens_BT, numbers_BT)
    if encoded is not None:
        contexts = tuple(
            dataclasses.replace(context, encoder_lengths_B=encoded.lengths_B)
            for context in contexts
        )
    return stack.run_cached(
        model.blocks,
        model.model.embed(tokens_BT, positions_BT),
        contexts,
        cache,
        None if encoded is None else encoded.cache,
        model.config.is_entry_normalised,
    )


def whole_logits(model: CachedModel, x_BTD: jax.Array) -> jax.Array:
    """Returns the logits of the last block's output, float32 [B, T, V], the vocabulary gathered."""
    logits_BTV = model.model.logits(x_BTD)
    spec = jax.sharding.PartitionSpec(model.rules.act("B")[0], None, None)
    return jax.sharding.reshard(logits_BTV, spec)


def next_logits(
    model: CachedModel,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    slot: jax.Array | int,
    cache: stack.Cache,
    encoded: cache_lib.Encoded | None = None,
) -> tuple[jax.Array, stack.Cache]:
    """Runs tokens at slots from `slot` on; returns the logits after the last, [B, V] float32."""
    x_BTD, cache = states(model, tokens_BT, starts_B, slot, cache, encoded)
    # The vocabulary is gathered: choosing a token looks at all of it.
    return whole_logits(model, x_BTD[:, -1:])[:, 0], cache


def seen(tokens_BT: jax.Array, starts_B: jax.Array, vocab_size: int) -> jax.Array:
    """Returns which ids the rows' texts hold, bool [B, V]; what lies before `starts_B` is none of them."""
    is_text_BT = jnp.arange(tokens_BT.shape[1])[None, :] >= starts_B[:, None]
    ids_BT = jnp.where(is_text_BT, tokens_BT, -1)
    return jax.vmap(lambda ids: jnp.any(ids[:, None] == jnp.arange(vocab_size), 0))(ids_BT)


def is_of_few_rows(model: CachedModel, *args: Any, **kwargs: Any) -> bool:
    """Returns whether a program of the model is one of `few_rows`."""
    del args, kwargs
    return few_rows.are_fast(model.config.dtype)


def _choose(
    logits_BV: jax.Array,
    state: DecodeState,
    params: samplers.SamplingParams,
    eos_id: int,
    pad_id: int,
    num_ids: int | None,
) -> DecodeState:
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, state.num_generated))(state.keys_B)
    if num_ids is not None:
        # A vocabulary that was rounded up has ids which stand for no text.
        is_id_V = jnp.arange(logits_BV.shape[1]) < num_ids
        logits_BV = jnp.where(is_id_V, logits_BV, jnp.finfo(jnp.float32).min)
    chosen_B = samplers.choose(logits_BV, state.is_seen_BV, params, keys_B)
    chosen_B = jnp.where(state.is_done_B, pad_id, chosen_B)
    is_seen_BV = state.is_seen_BV
    if is_seen_BV is not None:
        is_seen_BV = is_seen_BV | (chosen_B[:, None] == jnp.arange(is_seen_BV.shape[1]))
    return dataclasses.replace(
        state,
        last_B=chosen_B,
        num_generated=state.num_generated + 1,
        is_done_B=state.is_done_B | (chosen_B == eos_id),
        is_seen_BV=is_seen_BV,
    )


@few_rows.jit(
    is_of_few_rows, static_argnames=("params", "eos_id", "pad_id", "num_ids", "num_slots")
)
def prefill(
    model: CachedModel,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    keys_B: jax.Array,
    encoded: cache_lib.Encoded | None = None,
    *,
    params: samplers.SamplingParams,
    eos_id: int,
    pad_id: int,
    num_slots: int,
    num_ids: int | None = None,
) -> DecodeState:
    """Reads the prompts and chooses the first token of each row.

    Args:
      model: from `prepare_model`.
      tokens_BT: int32 prompts, padded on the left so that all end at slot T - 1.
      starts_B: int32, where each row's text begins.
      keys_B: of each row.
      encoded: from `encode`; prompts are what a decoder reads before it writes, its start at least.
      params, eos_id, pad_id: how to choose, and which token ends a row.
      num_slots: S of the cache, for prompts and what is generated.
      num_ids: ids that may be chosen, those below; None: all of the vocabulary.
    """
    batch_size, length = tokens_BT.shape
    cache = cache_lib.make_cache(model.config, model.rules, batch_size, num_slots)
    logits_BV, cache = next_logits(model, tokens_BT, starts_B, 0, cache, encoded)
    is_seen_BV = None
    if params.repetition_penalty != 1.0:
        is_seen_BV = seen(tokens_BT, starts_B, model.config.vocab_size)
    state = DecodeState(
        cache=cache,
        encoded=encoded,
        last_B=tokens_BT[:, -1],
        slot=jnp.asarray(length, jnp.int32),
        starts_B=starts_B,
        num_generated=jnp.zeros((), jnp.int32),
        keys_B=keys_B,
        is_done_B=jnp.zeros_like(starts_B, bool),
        is_seen_BV=is_seen_BV,
    )
    return _choose(logits_BV, state, params, eos_id, pad_id, num_ids)


@few_rows.jit(
    is_of_few_rows,
    static_argnames=("params", "eos_id", "pad_id", "num_ids", "num_tokens"),
    donate_argnames=("state",),
)
def decode(
    model: CachedModel,
    state: DecodeState,
    *,
    params: samplers.SamplingParams,
    eos_id: int,
    pad_id: int,
    num_tokens: int,
    num_ids: int | None = None,
) -> tuple[DecodeState, jax.Array]:
    """Generates up to `num_tokens` more tokens in one device loop; ends early when all rows have.

    Returns:
      The new state, and the tokens, int32 [num_tokens, B], `pad_id` after the end of a row. The
      cache is updated in place: the old state is gone.
    """

    def is_going(carry):
        index, state, _ = carry
        return (index < num_tokens) & ~jnp.all(state.is_done_B)

    def step(carry):
        index, state, tokens_NB = carry
        logits_BV, cache = next_logits(
            model,
            state.last_B[:, None],
            state.starts_B,
            state.slot,
            state.cache,
            state.encoded,
        )
        state = dataclasses.replace(state, cache=cache, slot=state.slot + 1)
        state = _choose(logits_BV, state, params, eos_id, pad_id, num_ids)
        tokens_NB = jax.lax.dynamic_update_slice_in_dim(tokens_NB, state.last_B[None], index, 0)
        return index + 1, state, tokens_NB

    spec = jax.sharding.PartitionSpec(None, model.rules.act("B")[0])
    shape = (num_tokens, state.last_B.shape[0])
    tokens_NB = jnp.full(shape, pad_id, jnp.int32, out_sharding=spec)
    _, state, tokens_NB = jax.lax.while_loop(is_going, step, (0, state, tokens_NB))
    return state, tokens_NB
