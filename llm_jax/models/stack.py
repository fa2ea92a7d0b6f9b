"""A block, and the stack of them: `jax.vmap` to initialise, `jax.lax.scan` to run, remat between."""

from collections.abc import Callable
import math
from typing import Any

from flax import nnx
import jax
from jax import ad_checkpoint
from jax.experimental import layout
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.kernels.decode_attention import op as decode_op
from llm_jax.models import attention
from llm_jax.models import context as context_lib
from llm_jax.models import latent_attention
from llm_jax.models import layers
from llm_jax.models import mlp
from llm_jax.models import parametrisation
from llm_jax.models.moe import balance
from llm_jax.models.moe import layer as moe_layer

Cache = list[decode_op.Cache]  # of each layer

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # Layers begin with what would else be kept on the device, so that a backward pass needs no more of it
    # than of one layer. Copies overlap with the layers around them.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["attention_logsumexp"],
        names_which_can_be_offloaded=["block_input", "attention_output"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # A backward pass attends again, but projects nothing for it.
    "qkv": jax.checkpoint_policies.save_only_these_names("query", "key", "value"),
    # With the logsumexp beside it a kernel's backward pass needs no second forward pass.
    "attention_output": jax.checkpoint_policies.save_only_these_names(
        "attention_output", "attention_logsumexp"
    ),
}


class Block(nnx.Module):
    """Attention, in a decoder that follows an encoder attention to that, and a feed-forward part.

    Each is a residual branch. `pre` normalises what enters it (Xiong et al. 2020), `post` what leaves
    the sum, as in the original Transformer (Vaswani et al. 2017, section 3.1), `output` what the branch
    gives (OLMo 2; 2025, section 3.2), `sandwich` what enters it and what it gives (Gemma 2; 2024). The
    feed-forward part may be one of experts.
    """

    def __init__(
        self,
        key: jax.Array,
        config: config_lib.ModelConfig,
        rules: sharding.AxisRules,
        has_cross: bool = False,
        has_experts: bool = False,
    ):
        attention_key, mlp_key, cross_key = jax.random.split(key, 3)
        self.placement, self.dropout = config.norm_placement, config.dropout
        num_layers = config.decoder_layers if has_cross else config.num_layers
        self.multiplier = parametrisation.branch_multiplier(config, num_layers)
        has_norm = config.norm_placement != "output"
        has_output_norm = config.norm_placement in ("output", "sandwich")

        def norm(is_present: bool) -> layers.Norm | None:
            return layers.Norm(config, rules) if is_present else None

        self.attention_norm = norm(has_norm)
        has_latents = config.kv_latent_dim is not None
        kind = latent_attention.LatentAttention if has_latents else attention.Attention
        self.attention = kind(attention_key, config, rules)
        self.attention_output_norm = norm(has_output_norm)
        self.cross_norm = norm(has_cross and has_norm)
        self.cross_attention = (
            attention.CrossAttention(cross_key, config, rules) if has_cross else None
        )
        self.cross_output_norm = norm(has_cross and has_output_norm)
        self.mlp_norm = norm(has_norm)
        self.mlp = (moe_layer.Moe if has_experts else mlp.Mlp)(mlp_key, config, rules)
        self.mlp_output_norm = norm(has_output_norm)

    def __call__(
        self,
        x_BTD: jax.Array,
        context: context_lib.Context,
        key: jax.Array | None = None,
        cache: decode_op.Cache | None = None,
        is_normalised: jax.Array | bool | None = None,
        encoder_cache: decode_op.Cache | None = None,
    ) -> tuple[jax.Array, decode_op.Cache | None, balance.Routed | None]:
        """Returns [B, T, D], the layer's cache, and what its router did if it has one.

        Args:
          x_BTD: of the layer before.
          context: of this kind of layer.
          key: of a training step: turns dropout on, and what routers do in training.
          cache: keys and values of the tokens before.
          is_normalised: whether `x_BTD` enters attention as it is; None: it does not.
          encoder_cache: keys and values of an encoder's tokens; None: of `context.encoder_BSD`.
        """
        # Of what is dropped inside and after each branch.
        inside = after = (None,) * 3
        if key is not None:
            inside, after = jax.random.split(key, (2, 3))

        def attend(h_BTD):
            nonlocal cache
            h_BTD, cache = self.attention(h_BTD, context, inside[0], cache)
            return h_BTD

        norms = (self.attention_norm, self.attention_output_norm)
        x_BTD = self._add(x_BTD, attend, *norms, after[0], context, is_normalised)
        if self.cross_attention is not None:

            def attend_to_encoder(h_BTD):
                return self.cross_attention(h_BTD, context, inside[1], encoder_cache)

            norms = (self.cross_norm, self.cross_output_norm)
            x_BTD = self._add(x_BTD, attend_to_encoder, *norms, after[1], context)
        routed = None

        def feed_forward(h_BTD):
            nonlocal routed
            if isinstance(self.mlp, mlp.Mlp):
                return self.mlp(h_BTD)
            h_BTD, routed = self.mlp(h_BTD, context, inside[2])
            return h_BTD

        norms = (self.mlp_norm, self.mlp_output_norm)
        return self._add(x_BTD, feed_forward, *norms, after[2], context), cache, routed

    def _add(
        self,
        x_BTD: jax.Array,
        branch: Callable[[jax.Array], jax.Array],
        norm: layers.Norm | None,
        output_norm: layers.Norm | None,
        key: jax.Array | None,
        context: context_lib.Context,
        is_normalised: jax.Array | bool | None = None,
    ) -> jax.Array:
        """Returns the sum of `x_BTD` and what a branch makes of it, with the norms of this placement."""
        h_BTD = x_BTD
        if self.placement in ("pre", "sandwich"):
            h_BTD = norm(x_BTD)
        if is_normalised is not None:
            h_BTD = jnp.where(is_normalised, x_BTD, h_BTD)
        h_BTD = branch(h_BTD)
        if output_norm is not None:
            h_BTD = output_norm(h_BTD)
        if self.multiplier is not None:
            h_BTD = h_BTD * jnp.asarray(self.multiplier, h_BTD.dtype)
        x_BTD = x_BTD + layers.dropout(h_BTD, self.dropout, key, context.places_T)
        return norm(x_BTD) if self.placement == "post" else x_BTD


class Stack(nnx.Module):
    """Blocks whose parameters are stacked along a leading dimension: those with experts, and the others."""

    def __init__(
        self,
        key: jax.Array,
        config: config_lib.ModelConfig,
        rules: sharding.AxisRules,
        num_layers: int,
        has_cross: bool = False,
        *,
        name: str,
    ):
        self.num_layers = num_layers
        self.is_scanned = config.scan_layers
        self.remat = config.remat
        self.is_entry_normalised = config.is_entry_normalised
        self.num_first, self.every = 0, 1
        self.has_experts = (False,) * num_layers
        if config.has_experts(name):
            self.num_first, self.every = config.moe.first_dense_layers, config.moe.every
            self.has_experts = config.expert_layers(num_layers)
        keys_L = jax.random.split(key, num_layers)

        def blocks(has_experts: bool) -> Block | None:
            places = [i for i, own in enumerate(self.has_experts) if own == has_experts]
            if not places:
                return None
            keys = keys_L if len(places) == num_layers else keys_L[jnp.asarray(places)]
            return jax.vmap(lambda key: Block(key, config, rules, has_cross, has_experts))(keys)

        self.layers = blocks(False)
        self.expert_layers = blocks(True)

    def __call__(
        self,
        x_BTD: jax.Array,
        contexts: tuple[context_lib.Context, ...],
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, balance.Routed | None]:
        """Returns the output of the last block, [B, T, D], and what routers did, stacked by layer.

        Args:
          x_BTD: what enters the first.
          contexts: of the layers, repeated over all of them.
          key: of a training step: turns dropout on.
        """
        keys_L = None if key is None else jax.random.split(key, self.num_layers)
        is_first_L = jnp.arange(self.num_layers) == 0 if self.is_entry_normalised else None
        own = keys_L, is_first_L
        bodies = [self._body(context) for context in contexts]
        # A pattern is unrolled inside the loop; what comes before it and what is left of one, outside.
        period = math.lcm(len(bodies), self.every)
        num_groups = (self.num_layers - self.num_first) // period if self.is_scanned else 0
        first, last = self.num_first, self.num_first + num_groups * period
        if not num_groups:
            first = last = 0
        found = []

        def run(x_BTD, index, layer):
            x_BTD, routed = bodies[index % len(bodies)](x_BTD, layer)
            return x_BTD, jax.tree.map(lambda x: x[None], routed)

        def group(x_BTD, of_group):
            blocks, own = of_group
            found, pattern = [], self.has_experts[first : first + period]
            for place, has_experts in enumerate(pattern):
                block = _layer(blocks[has_experts], pattern[:place].count(has_experts))
                x_BTD, routed = run(x_BTD, first + place, (block, *_layer(own, place)))
                found.append(routed)
            return x_BTD, _joined(found)

        for index in range(first):
            x_BTD, routed = run(x_BTD, index, (self._block(index), *_layer(own, index)))
            found.append(routed)
        if num_groups and period == 1:
            layers = self._between(first, last)[self.has_experts[first]]
            stacked = (layers, *_slice(own, first, last))
            x_BTD, routed = jax.lax.scan(bodies[first % len(bodies)], x_BTD, stacked)
            found.append(routed)
        elif num_groups:
            stacked = (self._between(first, last), _slice(own, first, last))
            groups = jax.tree.map(lambda x: x.reshape(num_groups, -1, *x.shape[1:]), stacked)
            x_BTD, routed = jax.lax.scan(group, x_BTD, groups)
            found.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), routed))
        for index in range(last, self.num_layers):
            x_BTD, routed = run(x_BTD, index, (self._block(index), *_layer(own, index)))
            found.append(routed)
        return x_BTD, _joined(found)

    def _of_kind(self, has_experts: bool) -> Block | None:
        return self.expert_layers if has_experts else self.layers

    def _block(self, index: int, take: Callable[[Any, int], Any] | None = None) -> Block:
        """Returns the block of a layer."""
        has_experts = self.has_experts[index]
        nth = self.has_experts[:index].count(has_experts)
        return (take or _layer)(self._of_kind(has_experts), nth)

    def _between(self, first: int, last: int) -> tuple[Block | None, Block | None]:
        """Returns the blocks of some layers, stacked: those without experts, and those with."""
        counts = [[self.has_experts[:end].count(kind) for end in (first, last)] for kind in (0, 1)]
        return tuple(_slice(self._of_kind(kind), *counts[kind]) for kind in (False, True))

    def _body(
        self, context: context_lib.Context
    ) -> Callable[[jax.Array, Any], tuple[jax.Array, balance.Routed | None]]:
        """Returns what runs a layer of one kind, given it, its key and whether it is the first."""

        def body(x_BTD, layer_key_and_place):
            layer, layer_key, is_first = layer_key_and_place
            # Left to itself, XLA may lay the states out with tokens innermost, and copy them in each layer.
            x_BTD = layout.with_layout_constraint(x_BTD, layout.Layout((0, 1, 2)))
            x_BTD = ad_checkpoint.checkpoint_name(x_BTD, "block_input")
            x_BTD, _, routed = layer(x_BTD, context, layer_key, is_normalised=is_first)
            return x_BTD, routed

        if self.remat == "none":
            return body
        policy = REMAT_POLICIES[self.remat]
        return jax.checkpoint(body, policy=policy, prevent_cse=not self.is_scanned)

    def unstacked(self) -> list[Block]:
        """Returns the blocks one by one.

        Generation reads every weight for every token: taking a layer out of the stack inside the
        loop would copy it each time, so it is done once, before.
        """
        return [self._block(index, _taken) for index in range(self.num_layers)]


@jax.jit
def _taken(stacked: Any, index: int) -> Any:
    """As `_layer`, but one program for all of them: hundreds of slices in one take seconds to compile."""
    return jax.tree.map(
        lambda array: jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False), stacked
    )


def _layer(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda array: array[index], stacked)


def _slice(stacked: Any, first: int, last: int) -> Any:
    return jax.tree.map(lambda array: array[first:last], stacked)


def _joined(found: list[balance.Routed | None]) -> balance.Routed | None:
    """Returns what routers of several layers did as one, stacked; None where there are none."""
    found = [routed for routed in found if routed is not None]
    if not found:
        return None
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)


def run_cached(
    blocks: list[Block],
    x_BTD: jax.Array,
    contexts: tuple[context_lib.Context, ...],
    cache: Cache,
    encoder_cache: Cache | None = None,
    is_entry_normalised: bool = False,
) -> tuple[jax.Array, Cache]:
    """Runs unstacked blocks with a cache each; returns [B, T, D] and the new caches.

    Args:
      blocks, x_BTD, contexts: as of `Stack`.
      cache: keys and values of the tokens before.
      encoder_cache: of the encoder's tokens, where the blocks attend to them.
      is_entry_normalised: as of the config.
    """
    new_cache = []
    of_encoder = [None] * len(blocks) if encoder_cache is None else encoder_cache
    for index, (block, own, other) in enumerate(zip(blocks, cache, of_encoder, strict=True)):
        x_BTD, own, _ = block(
            x_BTD,
            contexts[index % len(contexts)],
            cache=own,
            is_normalised=True if is_entry_normalised and index == 0 else None,
            encoder_cache=other,
        )
        new_cache.append(own)
    return x_BTD, new_cache
