"""Multi-head latent attention: keys and values of all heads are made of one small vector a token.

DeepSeek-V2 (arXiv 2405.04434), section 2.1, and DeepSeek-V3 (2412.19437), section 2.1.1. What a key has of
its token's position is a part of its own, which the heads share (section 2.1.3). So a cache holds the latent
and that part alone, and a step of generation attends to them as they are: the weights that would expand
latents are multiplied into the queries and into what was attended instead (section 2.1.2).
"""

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.kernels.decode_attention import caches
from llm_jax.kernels.decode_attention import op as decode_op
from llm_jax.kernels.flash_attention import op
from llm_jax.models import attention
from llm_jax.models import context as context_lib
from llm_jax.models import layers
from llm_jax.models import lora
from llm_jax.models import parametrisation
from llm_jax.models import positions


class LatentAttention(nnx.Module):
    """Projections to latents and from them, around `kernels.flash_attention`.

    Of a head's queries and keys `head_dim` elements are without positions and `rope_head_dim` rotated:
    `q_..HC` and `q_rope_..HC`, of a latent of their own (Z) if there is one and else of the states (D).
    """

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        D, H, C = config.embed_dim, config.num_heads, config.head_width
        rotated, Z, dtype = config.rope_head_width, config.kv_latent_dim, config.param_dtype
        std, out_std = parametrisation.hidden_stddev(config), parametrisation.branch_stddev(config)
        self.config, self.rules = config, rules
        keys = iter(jax.random.split(key, 8))

        def param(name: str, *shape: int, stddev: float = std) -> nnx.Param:
            return layers.normal_param(next(keys), name, shape, stddev, rules, dtype)

        self.latent_DZ = param("latent_DZ", D, Z)
        self.latent_norm = layers.LatentNorm(Z, config, rules)
        self.k_rope_DC = param("k_rope_DC", D, rotated)
        self.k_ZHC = param("k_ZHC", Z, H, C)
        self.v_ZHC = param("v_ZHC", Z, H, config.value_width)
        self.out_HCD = param("out_HCD", H, config.value_width, D, stddev=out_std)
        if config.q_latent_dim is None:
            self.q_DHC = param("q_DHC", D, H, C)
            self.q_rope_DHC = param("q_rope_DHC", D, H, rotated)
        else:
            Z = config.q_latent_dim
            self.q_latent_DZ = param("q_latent_DZ", D, Z)
            self.q_latent_norm = layers.LatentNorm(Z, config, rules)
            self.q_ZHC = param("q_ZHC", Z, H, C)
            self.q_rope_ZHC = param("q_rope_ZHC", Z, H, rotated)
        self.lora = lora.make("attention", key, self, config, rules)

    def __call__(
        self,
        x_BTD: jax.Array,
        context: context_lib.Context,
        key: jax.Array | None = None,
        cache: caches.ValuesInKeys | None = None,
    ) -> tuple[jax.Array, caches.ValuesInKeys | None]:
        """Returns the attended [B, T, D] and the cache with this call's latents in it.

        Arguments and what they mean are those of `attention.Attention`. A pass that starts the cache
        expands its latents to keys and values of each head, as training does; a later one does not.
        """
        q_BTHC, q_rope_BTHC = self.queries(x_BTD, context)
        latent_BTZ, k_rope_BTC = self.latents(x_BTD, context)
        if cache is not None:
            cache = cache.write(jnp.concatenate([latent_BTZ, k_rope_BTC], axis=-1), context.slot)
        if cache is None or isinstance(context.slot, int):
            q_BTHC = jnp.concatenate([q_BTHC, q_rope_BTHC], axis=-1)
            q_BTKGC, k_BSKC, v_BSKC = self._expanded(q_BTHC, latent_BTZ, k_rope_BTC)
            how = attention.scale(self.config)
            y_BTKGC = attention.attend(
                self.config, self.rules, q_BTKGC, k_BSKC, v_BSKC, context.mask, key, **how
            )
            y_BTHC = y_BTKGC[:, :, :, 0]
        else:
            y_BTHC = self._attend_absorbed(q_BTHC, q_rope_BTHC, cache, context)
        return self.out(y_BTHC[:, :, :, None]), cache

    def projected(
        self, x_BTD: jax.Array, context: context_lib.Context
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries [B, T, H, 1, C], keys and values [B, S, H, C], with positions."""
        q_BTHC = jnp.concatenate(self.queries(x_BTD, context), axis=-1)
        return self._expanded(q_BTHC, *self.latents(x_BTD, context))

    def inspected(
        self, x_BTD: jax.Array, context: context_lib.Context, function: Callable = op.weights
    ) -> jax.Array:
        """Returns what is to be looked at of a pass without a cache: weights, float32 [B, H, 1, T, S], or scores."""
        q_BTKGC, k_BSKC, _ = self.projected(x_BTD, context)
        how = attention.scale(self.config)
        return function(q_BTKGC, k_BSKC, mask=context.mask, **how)

    def out(self, y_BTKGC: jax.Array) -> jax.Array:
        """Returns what heads have gathered, groups of one, as one [B, T, D]."""
        y_BTHC, spec = y_BTKGC[:, :, :, 0], self.rules.act("BTD")
        weight = lora.matrix(self, "out_HCD")
        return layers.project("BTHC,HCD->BTD", y_BTHC, weight, None, spec)

    def queries(
        self, x_BTD: jax.Array, context: context_lib.Context
    ) -> tuple[jax.Array, jax.Array]:
        """Returns of the queries what has no position and what is rotated, [B, T, H, C] each."""
        spec = self.rules.act("BTHC")
        if self.config.q_latent_dim is None:
            q_BTHC = layers.project("BTD,DHC->BTHC", x_BTD, lora.matrix(self, "q_DHC"), None, spec)
            rotated_BTHC = layers.project(
                "BTD,DHC->BTHC", x_BTD, lora.matrix(self, "q_rope_DHC"), None, spec
            )
        else:
            act = self.rules.act("BTZ")
            latent_BTZ = layers.project(
                "BTD,DZ->BTZ", x_BTD, lora.matrix(self, "q_latent_DZ"), None, act
            )
            latent_BTZ = self.q_latent_norm(latent_BTZ)
            q_BTHC = layers.project(
                "BTZ,ZHC->BTHC", latent_BTZ, lora.matrix(self, "q_ZHC"), None, spec
            )
            rotated_BTHC = layers.project(
                "BTZ,ZHC->BTHC", latent_BTZ, lora.matrix(self, "q_rope_ZHC"), None, spec
            )
        return q_BTHC, self._rotated(rotated_BTHC, context)

    def latents(
        self, x_BTD: jax.Array, context: context_lib.Context
    ) -> tuple[jax.Array, jax.Array]:
        """Returns what keys and values are made of: normalised latents [B, T, Z] and the rotated part of
        all heads' keys [B, T, C]."""
        act = self.rules.act
        latent_BTZ = layers.project(
            "BTD,DZ->BTZ", x_BTD, lora.matrix(self, "latent_DZ"), None, act("BTZ")
        )
        k_rope_BTC = layers.project(
            "BTD,DC->BTC", x_BTD, lora.matrix(self, "k_rope_DC"), None, act("BTC")
        )
        return self.latent_norm(latent_BTZ), self._rotated(k_rope_BTC, context)

    def _rotated(self, x: jax.Array, context: context_lib.Context) -> jax.Array:
        return positions.rotate(x, context.rotary, self.config.rope_interleave)

    def _expanded(
        self, q_BTHC: jax.Array, latent_BTZ: jax.Array, k_rope_BTC: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries [B, T, H, 1, C] beside keys and values [B, S, H, C] of each head."""
        spec = self.rules.act("BTHC")
        k_BTHC = layers.project("BTZ,ZHC->BTHC", latent_BTZ, lora.matrix(self, "k_ZHC"), None, spec)
        v_BTHC = layers.project("BTZ,ZHC->BTHC", latent_BTZ, lora.matrix(self, "v_ZHC"), None, spec)
        shape = *k_BTHC.shape[:3], k_rope_BTC.shape[-1]
        k_rope_BTHC = jnp.broadcast_to(k_rope_BTC[:, :, None], shape, out_sharding=spec)
        k_BTHC = jnp.concatenate([k_BTHC, k_rope_BTHC], axis=-1)
        # Each head has keys of its own: key-value heads are heads, in groups of one.
        return attention.laid_out(self.rules, q_BTHC[:, :, :, None], k_BTHC, v_BTHC)

    def _attend_absorbed(
        self,
        q_BTHC: jax.Array,
        q_rope_BTHC: jax.Array,
        cache: caches.ValuesInKeys,
        context: context_lib.Context,
    ) -> jax.Array:
        """Attends to the latents of a cache, which are keys and values of one head that all queries share.

        `q . (k_ZHC^T z) = (k_ZHC q) . z`, and the sum of expanded values is the expanded sum of latents.
        """
        spec, (batch_size, num_queries) = self.rules.act("BTHC"), q_BTHC.shape[:2]
        q_BTHZ = layers.project("BTHC,ZHC->BTHZ", q_BTHC, lora.matrix(self, "k_ZHC"), None, spec)
        y_BTKGC = decode_op.attention(
            jnp.concatenate([q_BTHZ, q_rope_BTHC], axis=-1)[:, :, None],
            cache,
            lengths_B=jnp.full(batch_size, context.slot + num_queries, jnp.int32),
            starts_B=context.starts_B,
            window=context.window,
            **attention.scale(self.config),
        )
        return layers.project(
            "BTHZ,ZHC->BTHC", y_BTKGC[:, :, 0], lora.matrix(self, "v_ZHC"), None, spec
        )
