"""A block, and the stack of them: `jax.vmap` to initialise, `jax.lax.scan` to run, remat between."""

from collections.abc import Callable
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
    gives (OLMo 2; 2025, section 3.2), `sandwich` what enters it and what it gives (Gemma 2; 2024).
    """

    def __init__(
        self,
        key: jax.Array,
        config: config_lib.ModelConfig,
        rules: sharding.AxisRules,
        has_cross: bool = False,
    ):
        attention_key, mlp_key, cross_key = jax.random.split(key, 3)
        self.placement, self.dropout = config.norm_placement, config.dropout
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
        self.mlp = mlp.Mlp(mlp_key, config, rules)
        self.mlp_output_norm = norm(has_output_norm)

    def __call__(
        self,
        x_BTD: jax.Array,
        context: context_lib.Context,
        key: jax.Array | None = None,
        cache: decode_op.Cache | None = None,
        is_normalised: jax.Array | bool | None = None,
        encoder_cache: decode_op.Cache | None = None,
    ) -> tuple[jax.Array, decode_op.Cache | None]:
        """Returns [B, T, D] and the layer's cache.

        Args:
          x_BTD: of the layer before.
          context: of this kind of layer.
          key: turns dropout on.
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
        norms = (self.mlp_norm, self.mlp_output_norm)
        return self._add(x_BTD, self.mlp, *norms, after[2], context), cache

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
        x_BTD = x_BTD + layers.dropout(h_BTD, self.dropout, key, context.places_T)
        return norm(x_BTD) if self.placement == "post" else x_BTD


class Stack(nnx.Module):
    """Blocks whose parameters are stacked along a leading dimension."""

    def __init__(
        self,
        key: jax.Array,
        config: config_lib.ModelConfig,
        rules: sharding.AxisRules,
        num_layers: int,
        has_cross: bool = False,
    ):
        self.num_layers = num_layers
        self.is_scanned = config.scan_layers
        self.remat = config.remat
        self.is_entry_normalised = config.is_entry_normalised
        keys_L = jax.random.split(key, num_layers)
        self.layers = jax.vmap(lambda key: Block(key, config, rules, has_cross))(keys_L)

    def __call__(
        self,
        x_BTD: jax.Array,
        contexts: tuple[context_lib.Context, ...],
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the output of the last block, [B, T, D].

        Args:
          x_BTD: what enters the first.
          contexts: of the layers, repeated over all of them.
          key: turns dropout on.
        """
        keys_L = None if key is None else jax.random.split(key, self.num_layers)
        is_first_L = jnp.arange(self.num_layers) == 0 if self.is_entry_normalised else None
        stacked = (self.layers, keys_L, is_first_L)
        bodies = [self._body(context) for context in contexts]
        period = len(bodies)
        num_groups = self.num_layers // period if self.is_scanned else 0

        def group(x_BTD, layers_of_group):
            for index, body in enumerate(bodies):
                x_BTD = body(x_BTD, _layer(layers_of_group, index))
            return x_BTD, None

        if num_groups and period == 1:
            x_BTD, _ = jax.lax.scan(lambda x, layer: (bodies[0](x, layer), None), x_BTD, stacked)
        elif num_groups:
            # A pattern is unrolled inside the loop; what is left of one follows it.
            groups = jax.tree.map(
                lambda x: x[: num_groups * period].reshape(num_groups, period, *x.shape[1:]),
                stacked,
            )
            x_BTD, _ = jax.lax.scan(group, x_BTD, groups)
        for index in range(num_groups * period, self.num_layers):
            x_BTD = bodies[index % period](x_BTD, _layer(stacked, index))
        return x_BTD

    def _body(self, context: context_lib.Context) -> Callable[[jax.Array, Any], jax.Array]:
        """Returns what runs a layer of one kind, given it, its key and whether it is the first."""

        def body(x_BTD, layer_key_and_place):
            layer, layer_key, is_first = layer_key_and_place
            # Left to itself, XLA may lay the states out with tokens innermost, and copy them in each layer.
            x_BTD = layout.with_layout_constraint(x_BTD, layout.Layout((0, 1, 2)))
            x_BTD = ad_checkpoint.checkpoint_name(x_BTD, "block_input")
            x_BTD, _ = layer(x_BTD, context, layer_key, is_normalised=is_first)
            return x_BTD

        if self.remat == "none":
            return body
        policy = REMAT_POLICIES[self.remat]
        return jax.checkpoint(body, policy=policy, prevent_cse=not self.is_scanned)

    def unstacked(self) -> list[Block]:
        """Returns the blocks one by one.

        Generation reads every weight for every token: taking a layer out of the stack inside the
        loop would copy it each time, so it is done once, before.
        """
        return [_taken(self.layers, index) for index in range(self.num_layers)]


@jax.jit
def _taken(stacked: Any, index: int) -> Any:
    """As `_layer`, but one program for all of them: hundreds of slices in one take seconds to compile."""
    return jax.tree.map(
        lambda array: jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False), stacked
    )


def _layer(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda array: array[index], stacked)


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
        x_BTD, own = block(
            x_BTD,
            contexts[index % len(contexts)],
            cache=own,
            is_normalised=True if is_entry_normalised and index == 0 else None,
            encoder_cache=other,
        )
        new_cache.append(own)
    return x_BTD, new_cache
