"""What lies between a model's embeddings and its head: positions, blocks and the norm after them."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import ring
from llm_jax.models import context as context_lib
from llm_jax.models import layers
from llm_jax.models import positions
from llm_jax.models import stack
from llm_jax.models.moe import balance


class RelativeBias(nnx.Module):
    """T5's table of biases by bucket of distance, one for all layers (Raffel et al. 2020, section 2.1)."""

    def __init__(
        self,
        key: jax.Array,
        config: config_lib.ModelConfig,
        rules: sharding.AxisRules,
        is_causal: bool,
    ):
        K, G = config.kv_heads, config.num_heads // config.kv_heads
        shape, dtype = (K, G, config.relative_buckets), config.param_dtype
        self.max_distance, self.is_causal, self.rules = (
            config.relative_max_distance,
            is_causal,
            rules,
        )
        self.table_KGU = layers.normal_param(
            key, "table_KGU", shape, config.init_stddev, rules, dtype
        )

    def __call__(self) -> biases.Relative:
        """Returns the bias as attention takes it."""
        table_KGU = jax.sharding.reshard(
            self.table_KGU[...].astype(jnp.float32), self.rules.act("KGU")
        )
        return biases.Relative(table_KGU, self.max_distance, is_bidirectional=not self.is_causal)


class Trunk(nnx.Module):
    """Positions, stack and final norm."""

    def __init__(
        self,
        position_key: jax.Array,
        stack_key: jax.Array,
        config: config_lib.ModelConfig,
        rules: sharding.AxisRules,
        *,
        is_causal: bool,
        num_layers: int,
        has_cross: bool = False,
    ):
        dtype, std = config.param_dtype, config.init_stddev
        shape = (config.max_length, config.embed_dim)
        self.config, self.rules, self.is_causal = config, rules, is_causal
        self.position_PD = (
            layers.normal_param(position_key, "position_PD", shape, std, rules, dtype)
            if config.positions == "learned"
            else None
        )
        self.relative = (
            RelativeBias(position_key, config, rules, is_causal)
            if config.positions == "relative"
            else None
        )
        self.embedding_norm = layers.Norm(config, rules) if config.use_embedding_norm else None
        name = "decoder" if is_causal else "encoder"
        self.stack = stack.Stack(stack_key, config, rules, num_layers, has_cross, name=name)
        # The last block of a post-norm model ends with a norm of its own.
        has_final_norm = config.norm_placement != "post"
        self.final_norm = layers.Norm(config, rules) if has_final_norm else None

    def enter(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns embeddings with what positions add to them, normalised where the model does that."""
        dtype = x_BTD.dtype
        if self.position_PD is not None:
            x_BTD = x_BTD + layers.look_up(self.position_PD, "PD", positions_BT, dtype, self.rules)
        if self.config.positions == "sinusoidal":
            places_BTD = positions.sinusoids(positions_BT, self.config.embed_dim).astype(dtype)
            x_BTD = x_BTD + jax.sharding.reshard(places_BTD, self.rules.act("BTD"))
        return x_BTD if self.embedding_norm is None else self.embedding_norm(x_BTD)

    def contexts(
        self, positions_BT: jax.Array, within: masks.Mask | None = None, **how
    ) -> tuple[context_lib.Context, ...]:
        """Returns `context.make_contexts` of this trunk."""
        relative = None if self.relative is None else self.relative()
        return context_lib.make_contexts(
            self.config,
            self.rules,
            positions_BT,
            is_causal=self.is_causal,
            within=within,
            relative=relative,
            **how,
        )

    def run(
        self,
        x_BTD: jax.Array,
        contexts: tuple[context_lib.Context, ...],
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, balance.Routed | None]:
        """Returns the final states, [B, T, D], of what `enter` gave, and what routers did in its layers.

        `key` is that of a training step.
        """
        embed_key, stack_key = (None, None) if key is None else jax.random.split(key)
        places_T = jax.sharding.reshard(jnp.arange(x_BTD.shape[1]), self.rules.act("T"))
        if self.rules.context == "ring":
            places_T = ring.zigzag(places_T, axis=0)
        contexts = tuple(dataclasses.replace(c, places_T=places_T) for c in contexts)
        x_BTD = layers.dropout(x_BTD, self.config.dropout, embed_key, places_T)
        x_BTD, routed = self.stack(x_BTD, contexts, stack_key)
        return self.normalise(x_BTD), routed

    def normalise(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the final states of the last block's output."""
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD)


def by_stack(routed: dict[str, balance.Routed | None]) -> dict[str, balance.Routed]:
    """Returns what routers did of the stacks that have some."""
    return {name: own for name, own in routed.items() if own is not None}


def with_tokens(
    contexts: tuple[context_lib.Context, ...],
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None,
) -> tuple[context_lib.Context, ...]:
    """Returns the contexts with what routers of experts look at: ids, and which of them are no padding."""
    is_token_BT = None if segments_BT is None else segments_BT > 0
    return tuple(
        dataclasses.replace(context, tokens_BT=tokens_BT, is_token_BT=is_token_BT)
        for context in contexts
    )


def segments_mask(
    segments_BT: jax.Array | None,
    rules: sharding.AxisRules,
    k_segments_BS: jax.Array | None = None,
) -> masks.Mask | None:
    """Returns the mask within documents; keys' numbers if they are of another sequence."""
    if segments_BT is None:
        return None
    keys_BS = segments_BT if k_segments_BS is None else k_segments_BS
    return masks.Segments(segments_BT, jax.sharding.reshard(keys_BS, rules.act("BS")))
