"""The decoder-only language model: GPT-2, Llama and what lies between, as one config."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import ring
from llm_jax.models import attention
from llm_jax.models import layers
from llm_jax.models import stack


class Decoder(nnx.Module):
    """Embedding, stack, final norm and output head."""

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        embedding_key, position_key, stack_key, head_key = jax.random.split(key, 4)
        D, V, dtype = config.embed_dim, config.vocab_size, config.param_dtype
        std = config.init_stddev
        self.config, self.rules = config, rules
        self.embedding = layers.Embedding(embedding_key, config, rules)
        self.position_PD = (
            layers.normal_param(
                position_key, "position_PD", (config.max_length, D), std, rules, dtype
            )
            if config.positions == "learned"
            else None
        )
        self.stack = stack.Stack(stack_key, config, rules)
        self.final_norm = layers.Norm(config, rules) if config.norm_placement == "pre" else None
        self.head_DV = (
            None
            if config.tie_embeddings
            else layers.normal_param(head_key, "head_DV", (D, V), std, rules, dtype)
        )

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits, float32 [B, T, V], for whole sequences; arguments as `hidden`."""
        return self._project(self.hidden(tokens_BT, positions_BT, segments_BT, key))

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns what the output head reads, [B, T, D] in the compute dtype, for whole sequences.

        Under rules with `context` ring, all of these and the result are in the order of `ring.zigzag`.

        Args:
          tokens_BT: int32 ids.
          positions_BT: int32, from 0 in each document.
          segments_BT: int32 document numbers of packed sequences; None: one document a row.
          key: turns dropout on.
        """
        mask = attention.causal_mask(self.config)
        if segments_BT is not None:
            k_segments_BS = jax.sharding.reshard(segments_BT, self.rules.act("BS"))
            mask = mask & masks.Segments(segments_BT, k_segments_BS)
        context = attention.make_context(self.config, self.rules, positions_BT, mask)
        embed_key, stack_key = (None, None) if key is None else jax.random.split(key)
        places_T = jax.sharding.reshard(jnp.arange(tokens_BT.shape[1]), self.rules.act("T"))
        if self.rules.context == "ring":
            places_T = ring.zigzag(places_T, axis=0)
        context = dataclasses.replace(context, places_T=places_T)
        x_BTD = self.embed(tokens_BT, positions_BT)
        x_BTD = layers.dropout(x_BTD, self.config.dropout, embed_key, places_T)
        return self._normalise(self.stack(x_BTD, context, stack_key))

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns what enters the stack, [B, T, D] in the compute dtype."""
        x_BTD = self.embedding(tokens_BT, self.config.dtype)
        if self.position_PD is not None:
            x_BTD = x_BTD + layers.look_up(
                self.position_PD, "PD", positions_BT, self.config.dtype, self.rules
            )
        return x_BTD

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the next-token logits, float32 [B, T, V], of the last block's output."""
        return self._project(self._normalise(x_BTD))

    def head(self) -> tuple[str, nnx.Param]:
        """Returns the output head and its dimensions: `DV`, or `VD` of a tied embedding."""
        return ("VD", self.embedding.table_VD) if self.head_DV is None else ("DV", self.head_DV)

    def _normalise(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD)

    def _project(self, x_BTD: jax.Array) -> jax.Array:
        dims_of_head, head = self.head()
        logits_BTV = layers.project(
            f"BTD,{dims_of_head}->BTV", x_BTD, head, None, self.rules.act("BTV")
        )
        return layers.softcap(logits_BTV.astype(jnp.float32), self.config.logit_softcap)
