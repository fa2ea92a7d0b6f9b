"""Multi-head attention with grouped keys and values, and the cache it keeps while generating."""

import dataclasses
from typing import Any

from flax import nnx
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.kernels import placement
from llm_jax.kernels.decode_attention import op as decode_op
from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import op
from llm_jax.kernels.flash_attention import pallas
from llm_jax.models import layers
from llm_jax.models import positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share.

    Attributes:
      mask: who attends to whom among the tokens of this pass, with the kernels' tables if they need
        some; None where a cache precedes them.
      rotary: cosines and sines of `positions.rotary_tables`; None without RoPE.
      bias: added to the scores; None without ALiBi.
      slot: of the first token in the cache; the integer 0 where nothing precedes it.
      starts_B: first slot of each row in the cache; None: 0.
      places_T: of the tokens in their sequence, which dropout goes by; None where there is none.
    """

    mask: masks.Mask | pallas.Prepared | None
    rotary: tuple[jax.Array, jax.Array] | None = None
    bias: biases.Alibi | None = None
    slot: jax.Array | int = 0
    starts_B: jax.Array | None = None
    places_T: jax.Array | None = None


def causal_mask(config: config_lib.ModelConfig) -> masks.Mask:
    """Returns the decoder's mask: all slots before, or a window of them that ends at the query."""
    return masks.local_window(None if config.window is None else config.window - 1, right=0)


def make_context(
    config: config_lib.ModelConfig,
    rules: sharding.AxisRules,
    positions_BT: jax.Array,
    mask: masks.Mask | None,
    slot: jax.Array | int = 0,
    starts_B: jax.Array | None = None,
) -> Context:
    """Returns the context of a pass over tokens at `positions_BT`."""
    rotary = bias = None
    if config.positions == "rope":
        rotary = positions.rotary_tables(config, positions_BT)
    if config.positions == "alibi":
        slopes_KG = jnp.asarray(positions.alibi_slopes(config.num_heads))
        bias = biases.Alibi(slopes_KG.reshape(config.kv_heads, -1))
    if mask is not None:
        C, groups = config.head_width, config.num_heads // config.kv_heads
        mask = op.prepare(
            mask,
            positions_BT,
            num_keys=positions_BT.shape[1],
            widths=(C, C),
            group=groups // placement.num_parts(rules.act("G")[0]),
            dtype=config.dtype,
            implementation=config.attention,
            bias=bias,
        )
    return Context(mask, rotary, bias, slot, starts_B)


class Attention(nnx.Module):
    """Projections of queries, keys, values and output around `kernels.flash_attention`."""

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        D, K, C = config.embed_dim, config.kv_heads, config.head_width
        G = config.num_heads // K
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        std, dtype = config.init_stddev, config.param_dtype
        # Residual branches start smaller by the square root of their number (GPT-2, section 2.3).
        out_std = std / (2 * config.num_layers) ** 0.5
        self.config, self.rules = config, rules
        self.q_DKGC = layers.normal_param(q_key, "q_DKGC", (D, K, G, C), std, rules, dtype)
        self.k_DKC = layers.normal_param(k_key, "k_DKC", (D, K, C), std, rules, dtype)
        self.v_DKC = layers.normal_param(v_key, "v_DKC", (D, K, C), std, rules, dtype)
        self.out_KGCD = layers.normal_param(o_key, "out_KGCD", (K, G, C, D), out_std, rules, dtype)
        has_bias = config.use_bias
        self.q_bias_KGC = layers.bias_param(has_bias, "q_bias_KGC", (K, G, C), rules, dtype)
        self.k_bias_KC = layers.bias_param(has_bias, "k_bias_KC", (K, C), rules, dtype)
        self.v_bias_KC = layers.bias_param(has_bias, "v_bias_KC", (K, C), rules, dtype)
        self.out_bias_D = layers.bias_param(has_bias, "out_bias_D", (D,), rules, dtype)
        self.q_norm = layers.HeadNorm(config, rules) if config.use_qk_norm else None
        self.k_norm = layers.HeadNorm(config, rules) if config.use_qk_norm else None

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: decode_op.Cache | None = None
    ) -> tuple[jax.Array, decode_op.Cache | None]:
        """Returns the attended [B, T, D] and the cache with this call's keys and values in it.

        With a cache, the keys and values of `x_BTD` are written from slot `context.slot` on. A pass
        that starts the cache (the slot is an integer) attends to its own keys alone, by the mask; a
        later one to all that each row has in the cache, which ends with its own keys.
        """
        q_BTKGC, k_BSKC, v_BSKC = self._project(x_BTD, context)
        # Queries stay sharded along the sequence; each device gathers all keys and values, but in a ring.
        k_BSKC = jax.sharding.reshard(k_BSKC, self.rules.act("BSKC"))
        v_BSKC = jax.sharding.reshard(v_BSKC, self.rules.act("BSKC"))
        if cache is not None:
            cache = cache.write(k_BSKC, v_BSKC, context.slot)
        if cache is None or isinstance(context.slot, int):
            y_BTKGC = op.attention(
                q_BTKGC,
                k_BSKC,
                v_BSKC,
                mask=context.mask,
                implementation=self.config.attention,
                chunk=self.config.attention_chunk,
                context=self.rules.context,
                **self._scores(context),
            )
        else:
            batch_size, num_queries = q_BTKGC.shape[:2]
            y_BTKGC = decode_op.attention(
                q_BTKGC,
                cache,
                lengths_B=jnp.full(batch_size, context.slot + num_queries, jnp.int32),
                starts_B=context.starts_B,
                window=self.config.window,
                # The layout says the rest: `decode_op.make_cache` chose it by the same setting.
                implementation="pallas" if self.config.attention == "pallas" else "auto",
                **self._scores(context),
            )
        y_BTD = layers.project(
            "BTKGC,KGCD->BTD", y_BTKGC, self.out_KGCD, self.out_bias_D, self.rules.act("BTD")
        )
        return y_BTD, cache

    def _scores(self, context: Context) -> dict[str, Any]:
        return {
            "scale": self.config.head_width**-0.5,
            "softcap": self.config.attention_softcap,
            "bias": context.bias,
        }

    def _project(
        self, x_BTD: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        act = self.rules.act
        q_BTKGC = layers.project(
            "BTD,DKGC->BTKGC", x_BTD, self.q_DKGC, self.q_bias_KGC, act("BTKGC")
        )
        k_BTKC = layers.project("BTD,DKC->BTKC", x_BTD, self.k_DKC, self.k_bias_KC, act("BTKC"))
        v_BTKC = layers.project("BTD,DKC->BTKC", x_BTD, self.v_DKC, self.v_bias_KC, act("BTKC"))
        if self.q_norm is not None:
            q_BTKGC, k_BTKC = self.q_norm(q_BTKGC), self.k_norm(k_BTKC)
        if context.rotary is not None:
            q_BTKGC = positions.rotate(q_BTKGC, context.rotary)
            k_BTKC = positions.rotate(k_BTKC, context.rotary)
        named = {"query": q_BTKGC, "key": k_BTKC, "value": v_BTKC}  # for remat policies
        return tuple(ad_checkpoint.checkpoint_name(x, name) for name, x in named.items())
