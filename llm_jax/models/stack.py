"""A block, and the stack of them: `jax.vmap` to initialise, `jax.lax.scan` to run, remat between."""

from typing import Any

from flax import nnx
import jax
from jax import ad_checkpoint

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.kernels.decode_attention import op as decode_op
from llm_jax.models import attention
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
    """Attention and a feed-forward part, each on a residual branch.

    `pre` normalises what enters a branch (Xiong et al. 2020), `post` what leaves the sum, as in
    the original Transformer (Vaswani et al. 2017, section 3.1).
    """

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        attention_key, mlp_key = jax.random.split(key)
        self.is_pre_norm = config.norm_placement == "pre"
        self.dropout = config.dropout
        self.attention_norm = layers.Norm(config, rules)
        self.attention = attention.Attention(attention_key, config, rules)
        self.mlp_norm = layers.Norm(config, rules)
        self.mlp = mlp.Mlp(mlp_key, config, rules)

    def __call__(
        self,
        x_BTD: jax.Array,
        context: attention.Context,
        key: jax.Array | None = None,
        cache: decode_op.Cache | None = None,
    ) -> tuple[jax.Array, decode_op.Cache | None]:
        """Returns [B, T, D] and the layer's cache; `key` turns dropout on."""
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        h_BTD = self.attention_norm(x_BTD) if self.is_pre_norm else x_BTD
        h_BTD, cache = self.attention(h_BTD, context, cache)
        x_BTD = x_BTD + layers.dropout(h_BTD, self.dropout, attention_key, context.places_T)
        x_BTD = x_BTD if self.is_pre_norm else self.attention_norm(x_BTD)
        h_BTD = self.mlp_norm(x_BTD) if self.is_pre_norm else x_BTD
        h_BTD = self.mlp(h_BTD)
        x_BTD = x_BTD + layers.dropout(h_BTD, self.dropout, mlp_key, context.places_T)
        x_BTD = x_BTD if self.is_pre_norm else self.mlp_norm(x_BTD)
        return x_BTD, cache


class Stack(nnx.Module):
    """`num_layers` blocks whose parameters are stacked along a leading dimension."""

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        self.num_layers = config.num_layers
        self.is_scanned = config.scan_layers
        self.remat = config.remat
        keys_L = jax.random.split(key, config.num_layers)
        self.layers = jax.vmap(lambda layer_key: Block(layer_key, config, rules))(keys_L)

    def __call__(
        self, x_BTD: jax.Array, context: attention.Context, key: jax.Array | None = None
    ) -> jax.Array:
        """Returns the output of the last block, [B, T, D]; `key` turns dropout on."""

        def body(x_BTD, layer_and_key):
            layer, layer_key = layer_and_key
            x_BTD = ad_checkpoint.checkpoint_name(x_BTD, "block_input")
            x_BTD, _ = layer(x_BTD, context, layer_key)
            return x_BTD, None

        if self.remat != "none":
            body = jax.checkpoint(
                body, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.is_scanned
            )
        keys_L = None if key is None else jax.random.split(key, self.num_layers)
        if self.is_scanned:
            x_BTD, _ = jax.lax.scan(body, x_BTD, (self.layers, keys_L))
            return x_BTD
        for index in range(self.num_layers):
            x_BTD, _ = body(x_BTD, _layer((self.layers, keys_L), index))
        return x_BTD

    def unstacked(self) -> list[Block]:
        """Returns the blocks one by one.

        Generation reads every weight for every token: taking a layer out of the stack inside the
        loop would copy it each time, so it is done once, before.
        """
        return [_layer(self.layers, index) for index in range(self.num_layers)]


def _layer(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda array: array[index], stacked)


def run_cached(
    blocks: list[Block], x_BTD: jax.Array, context: attention.Context, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Runs unstacked blocks with a cache each; returns [B, T, D] and the new caches."""
    new_cache = []
    for block, layer_cache in zip(blocks, cache, strict=True):
        x_BTD, layer_cache = block(x_BTD, context, cache=layer_cache)
        new_cache.append(layer_cache)
    return x_BTD, new_cache
