"""Multi-head attention with grouped keys and values: to the tokens themselves, or to an encoder's."""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.kernels.decode_attention import caches
from llm_jax.kernels.decode_attention import op as decode_op
from llm_jax.kernels.flash_attention import dropout as dropout_lib
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import op
from llm_jax.kernels.flash_attention import pallas
from llm_jax.models import context as context_lib
from llm_jax.models import layers
from llm_jax.models import lora
from llm_jax.models import parametrisation
from llm_jax.models import positions


class Attention(nnx.Module):
    """Projections of queries, keys, values and output around `kernels.flash_attention`."""

    kind = "attention"  # as settings call it

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        D, K, C = config.embed_dim, config.kv_heads, config.head_width
        G = config.num_heads // K
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        std, dtype = parametrisation.hidden_stddev(config), config.param_dtype
        out_std = parametrisation.branch_stddev(config)
        self.config, self.rules = config, rules
        self.q_DKGC = layers.normal_param(q_key, "q_DKGC", (D, K, G, C), std, rules, dtype)
        self.k_DKC = layers.normal_param(k_key, "k_DKC", (D, K, C), std, rules, dtype)
        self.v_DKC = layers.normal_param(v_key, "v_DKC", (D, K, C), std, rules, dtype)
        self.out_KGCD = layers.normal_param(o_key, "out_KGCD", (K, G, C, D), out_std, rules, dtype)
        has_bias = config.use_bias or config.use_qkv_bias
        self.q_bias_KGC = layers.bias_param(has_bias, "q_bias_KGC", (K, G, C), rules, dtype)
        self.k_bias_KC = layers.bias_param(has_bias, "k_bias_KC", (K, C), rules, dtype)
        self.v_bias_KC = layers.bias_param(has_bias, "v_bias_KC", (K, C), rules, dtype)
        self.out_bias_D = layers.bias_param(config.use_bias, "out_bias_D", (D,), rules, dtype)
        self.q_norm = layers.HeadNorm(config, rules, "KG") if config.use_qk_norm else None
        self.k_norm = layers.HeadNorm(config, rules, "K") if config.use_qk_norm else None
        self.lora = lora.make(self.kind, key, self, config, rules)

    def __call__(
        self,
        x_BTD: jax.Array,
        context: context_lib.Context,
        key: jax.Array | None = None,
        cache: decode_op.Cache | None = None,
    ) -> tuple[jax.Array, decode_op.Cache | None]:
        """Returns the attended [B, T, D] and the cache with this call's keys and values in it.

        With a cache, the keys and values of `x_BTD` are written from slot `context.slot` on. A pass
        that starts the cache (the slot is an integer) attends to its own keys alone, by the mask; a
        later one to all that each row has in the cache, which ends with its own keys. `key` turns
        dropout on.
        """
        q_BTKGC, k_BSKC, v_BSKC = self.projected(x_BTD, context)
        if cache is not None:
            cache = cache.write(k_BSKC, v_BSKC, context.slot)
        if cache is None or isinstance(context.slot, int):
            y_BTKGC = self._attend(
                q_BTKGC, k_BSKC, v_BSKC, context.mask, key, **self._scores(context)
            )
        else:
            batch_size, num_queries = q_BTKGC.shape[:2]
            y_BTKGC = decode_op.attention(
                q_BTKGC,
                cache,
                lengths_B=jnp.full(batch_size, context.slot + num_queries, jnp.int32),
                starts_B=context.starts_B,
                window=context.window,
                implementation=self._reader(cache),
                **self._scores(context),
            )
        return self.out(y_BTKGC), cache

    def projected(
        self, x_BTD: jax.Array, context: context_lib.Context
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries [B, T, K, G, C], keys and values [B, S, K, C], with positions."""
        q_BTKGC, k_BTKC = self.queries(x_BTD), self.keys(x_BTD)
        if context.rotary is not None:
            how = {"tables": context.rotary, "is_interleaved": self.config.rope_interleave}
            q = positions.rotate(self._by_heads(q_BTKGC, "BTKGC"), **how)
            q_BTKGC = self._by_groups(q)
            k_BTKC = positions.rotate(k_BTKC, **how)
        return laid_out(self.rules, q_BTKGC, k_BTKC, self.values(x_BTD))

    def inspected(
        self, x_BTD: jax.Array, context: context_lib.Context, function: Callable = op.weights
    ) -> jax.Array:
        """Returns what is to be looked at of a pass without a cache: weights, float32 [B, K, G, T, S], or scores."""
        q_BTKGC, k_BSKC, _ = self.projected(x_BTD, context)
        return function(q_BTKGC, k_BSKC, mask=context.mask, **self._scores(context))

    def queries(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the queries [B, T, K, G, C], without positions."""
        heads, bias = self._heads, self.q_bias_KGC
        weight = self._by_heads(lora.matrix(self, "q_DKGC")[...], "DKGC", is_param=True)
        bias = None if bias is None else self._by_heads(bias[...], "KGC", is_param=True)
        spec = self.rules.act(f"BT{heads}C")
        q = layers.project(f"BTD,D{heads}C->BT{heads}C", x_BTD, weight, bias, spec)
        q_BTKGC = self._by_groups(q)
        return q_BTKGC if self.q_norm is None else self.q_norm(q_BTKGC)

    def keys(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the keys [B, T, K, C], without positions."""
        spec = self.rules.act("BTKC")
        weight = lora.matrix(self, "k_DKC")
        k_BTKC = layers.project("BTD,DKC->BTKC", x_BTD, weight, self.k_bias_KC, spec)
        return k_BTKC if self.k_norm is None else self.k_norm(k_BTKC)

    def values(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the values [B, T, K, C]."""
        spec = self.rules.act("BTKC")
        weight = lora.matrix(self, "v_DKC")
        return layers.project("BTD,DKC->BTKC", x_BTD, weight, self.v_bias_KC, spec)

    def out(self, y_BTKGC: jax.Array) -> jax.Array:
        """Returns what heads have gathered as one [B, T, D]."""
        heads, spec = self._heads, self.rules.act("BTD")
        weight = self._by_heads(lora.matrix(self, "out_KGCD")[...], "KGCD", is_param=True)
        y = self._by_heads(y_BTKGC, "BTKGC")
        return layers.project(f"BT{heads}C,{heads}CD->BTD", y, weight, self.out_bias_D, spec)

    @property
    def _heads(self) -> str:
        """The letters of query heads: one, unless their groups are what a mesh axis cuts.

        As one dimension they keep the layout that kernels want. Of two, XLA makes queries and their
        gradients transposed, and copies them five times a layer.
        """
        return "H" if self.rules.act("G")[0] is None else "KG"

    def _by_heads(
        self, x: jax.Array | lora.Updated, dims: str, is_param: bool = False
    ) -> jax.Array | lora.Updated:
        """Returns an array of dimensions `dims`, with K and G as `_heads` has them."""
        if self._heads == "KG" or "K" not in dims:
            return x
        if isinstance(x, lora.Updated):
            return x.map(dims, functools.partial(self._by_heads, is_param=is_param))
        first = dims.index("K")
        shape = *x.shape[:first], -1, *x.shape[first + 2 :]
        spec_of = self.rules.param if is_param else self.rules.act
        return x.reshape(shape, out_sharding=spec_of(dims.replace("KG", "H")))

    def _by_groups(self, q: jax.Array) -> jax.Array:
        """Returns queries [B, T, K, G, C] of heads as `_heads` has them."""
        shape = *q.shape[:2], *self.q_DKGC.shape[1:]
        return jnp.reshape(q, shape, out_sharding=self.rules.act("BTKGC"))

    def _attend(self, *arrays: Any, **how: Any) -> jax.Array:
        return attend(self.config, self.rules, *arrays, **how)

    def _reader(self, cache: decode_op.Cache) -> str:
        """Returns what attends to a cache: the layout, which was chosen by the same setting, says the rest."""
        is_kernels = not isinstance(cache, caches.SlotsLast)
        return "pallas" if self.config.attention == "pallas" and is_kernels else "auto"

    def _scores(self, context: context_lib.Context) -> dict[str, Any]:
        return self._scale() | {"bias": context.bias}

    def _scale(self) -> dict[str, Any]:
        return scale(self.config)


def laid_out(
    rules: sharding.AxisRules, q_BTKGC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Names queries, keys and values for remat policies, and brings keys to their queries.

    Queries stay sharded along the sequence; each device gathers all keys and values, but in a ring.
    """
    named = {"query": q_BTKGC, "key": k_BTKC, "value": v_BTKC}
    q, k, v = (ad_checkpoint.checkpoint_name(x, name) for name, x in named.items())
    spec = rules.act("BSKC")
    return q, jax.sharding.reshard(k, spec), jax.sharding.reshard(v, spec)


def attend(
    config: config_lib.ModelConfig,
    rules: sharding.AxisRules,
    q_BTKGC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    mask: masks.Mask | pallas.Prepared,
    key: jax.Array | None,
    **how: Any,
) -> jax.Array:
    """Returns `flash_attention.op.attention` as a config wants it; `key` drops attention weights."""
    rate, dropout = config.attention_dropout, None
    if key is not None and rate > 0.0:
        dropout = dropout_lib.Dropout(jax.random.bits(key, (), jnp.uint32), rate)
    return op.attention(
        q_BTKGC,
        k_BSKC,
        v_BSKC,
        mask=mask,
        implementation=config.attention,
        chunk=config.attention_chunk,
        context=rules.context,
        dropout=dropout,
        **how,
    )


def scale(config: config_lib.ModelConfig) -> dict[str, Any]:
    """Returns what is done to the scores of any attention, to tokens or to a cache."""
    factor = config.attention_scale
    return {
        "scale": parametrisation.attention_scale(config) if factor is None else factor,
        "softcap": config.attention_softcap,
    }


class CrossAttention(Attention):
    """Attention of a decoder to what the encoder made of its text (Vaswani et al. 2017, section 3.2.3).

    Neither positions nor biases: the mask alone says who sees whom. In generation keys and values are
    computed once and lie in a cache, of which each row's first tokens are seen by all queries.
    """

    kind = "cross_attention"

    def __call__(
        self,
        x_BTD: jax.Array,
        context: context_lib.Context,
        key: jax.Array | None = None,
        cache: decode_op.Cache | None = None,
    ) -> jax.Array:
        """Returns the attended [B, T, D].

        Args:
          x_BTD: of the decoder.
          context: with what the encoder made of its tokens, or the lengths of the rows of `cache`.
          key: turns dropout on.
          cache: what `remember` gave.
        """
        if cache is not None:
            return self.out(self._attend_to(cache, self.queries(x_BTD), context.encoder_lengths_B))
        q_BTKGC, k_BSKC, v_BSKC = self.projected(x_BTD, context)
        y_BTKGC = self._attend(q_BTKGC, k_BSKC, v_BSKC, context.cross_mask, key, **self._scale())
        return self.out(y_BTKGC)

    def projected(
        self, x_BTD: jax.Array, context: context_lib.Context
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries [B, T, K, G, C] of the decoder, keys and values [B, S, K, C] of the encoder."""
        k_BSKC, v_BSKC = self.keys(context.encoder_BSD), self.values(context.encoder_BSD)
        return laid_out(self.rules, self.queries(x_BTD), k_BSKC, v_BSKC)

    def inspected(
        self, x_BTD: jax.Array, context: context_lib.Context, function: Callable = op.weights
    ) -> jax.Array:
        """Returns what is to be looked at of a pass without a cache: weights, float32 [B, K, G, T, S], or scores."""
        q_BTKGC, k_BSKC, _ = self.projected(x_BTD, context)
        return function(q_BTKGC, k_BSKC, mask=context.cross_mask, **self._scale())

    def remember(self, encoder_BSD: jax.Array, cache: decode_op.Cache) -> decode_op.Cache:
        """Returns the cache with the keys and values of the encoder's final states in it."""
        spec = self.rules.act("BSKC")
        k_BSKC, v_BSKC = self.keys(encoder_BSD), self.values(encoder_BSD)
        return cache.write(
            jax.sharding.reshard(k_BSKC, spec), jax.sharding.reshard(v_BSKC, spec), 0
        )

    def _attend_to(
        self, cache: decode_op.Cache, q_BTKGC: jax.Array, lengths_B: jax.Array
    ) -> jax.Array:
        """Attends to a cache, whose rows serve as many queries each."""
        shape, spec = q_BTKGC.shape, self.rules.act("BTKGC")
        num_rows = lengths_B.shape[0]
        by_row = (num_rows, shape[0] // num_rows * shape[1], *shape[2:])
        y_BTKGC = decode_op.attention(
            jnp.reshape(q_BTKGC, by_row, out_sharding=spec),
            cache,
            lengths_B=lengths_B,
            is_causal=False,
            implementation=self._reader(cache),
            **self._scale(),
        )
        return jnp.reshape(y_BTKGC, shape, out_sharding=spec)
