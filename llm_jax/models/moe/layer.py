"""The feed-forward part with experts, in the place of `mlp.Mlp`."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.models import context as context_lib
from llm_jax.models import layers
from llm_jax.models import mlp
from llm_jax.models.moe import balance
from llm_jax.models.moe import balanced
from llm_jax.models.moe import dispatch
from llm_jax.models.moe import routers
from llm_jax.models.moe import routing
from llm_jax.models.moe import sort

# Routers with scores that a balance loss or a z-loss may press on.
_SCORED = ("softmax", "sigmoid", "switch", "gshard", "sinkhorn")
_UNSCORED = ("hash", "random")


class Router(nnx.Module):
    """A projection to one logit an expert, in float32, and the choice by them that the config names."""

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        moe, dtype = config.moe, config.param_dtype
        D, E = config.embed_dim, moe.num_experts
        self.config, self.rules = moe, rules
        self.router_DE = (
            layers.normal_param(key, "router_DE", (D, E), config.init_stddev, rules, dtype)
            if moe.router not in _UNSCORED
            else None
        )
        # Neither has a gradient: `balance` says how they move. A scalar's name ends without a letter.
        self.selection_bias_E = (
            layers.full_param("selection_bias_E", (E,), 0.0, rules, "float32")
            if moe.use_selection_bias
            else None
        )
        self.penalty_ = (
            layers.full_param("penalty_", (), balance.FIRST_PENALTY, rules, "float32")
            if moe.router == "relu"
            else None
        )

    def __call__(
        self, x_BTD: jax.Array, context: context_lib.Context, key: jax.Array | None
    ) -> tuple[routing.Routing, balance.Routed]:
        """Returns the experts of each token, and what they weigh in the objective and show in the log.

        Args:
          x_BTD: states.
          context: with the tokens' ids and whether they are any.
          key: of a training step; None: the router is used as it is, without noise and balancing.
        """
        logits_BTE = None
        if self.router_DE is not None:
            logits_BTE = self._logits(x_BTD, key)
        by_row = PartitionSpec(self.rules.act("B")[0], None)
        is_token_BT = jnp.ones(x_BTD.shape[:2], bool, out_sharding=by_row)
        if context.is_token_BT is not None:
            is_token_BT = jax.sharding.reshard(context.is_token_BT, by_row)
        routed = self._chosen(logits_BTE, is_token_BT, context, key, by_row)
        routed = routed.without(~is_token_BT[..., None])
        return routed, self._summary(routed, logits_BTE, is_token_BT)

    def _logits(self, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns float32 [B, T, E], with all tokens of a row on each of its devices."""
        moe, weight_DE = self.config, self.router_DE[...]
        if moe.is_router_frozen:
            weight_DE = jax.lax.stop_gradient(weight_DE)
        x_BTD = x_BTD.astype(jnp.float32)
        if moe.jitter and key is not None:
            noise_BTD = jax.random.uniform(
                jax.random.fold_in(key, 0),
                x_BTD.shape,
                minval=1.0 - moe.jitter,
                maxval=1.0 + moe.jitter,
                out_sharding=jax.typeof(x_BTD).sharding.spec,
            )
            x_BTD = x_BTD * noise_BTD
        spec = self.rules.act("BT")
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE",
            x_BTD,
            weight_DE.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=PartitionSpec(*spec, None),
        )
        return jax.sharding.reshard(logits_BTE, PartitionSpec(spec[0], None, None))

    def _chosen(
        self,
        logits_BTE: jax.Array | None,
        is_token_BT: jax.Array,
        context: context_lib.Context,
        key: jax.Array | None,
        by_row: PartitionSpec,
    ) -> routing.Routing:
        """Returns the choice of the router that the config names."""
        moe, name, is_training = self.config, self.config.router, key is not None
        k, E = moe.experts_per_token, moe.num_experts
        weighted = {"is_normalised": moe.normalise_weights, "scale": moe.weight_scale}
        bias_E = None if self.selection_bias_E is None else self.selection_bias_E[...]
        if name in ("softmax", "sigmoid"):
            top_k = routers.softmax_top_k if name == "softmax" else routers.sigmoid_top_k
            groups = {"num_groups": moe.num_groups, "groups_per_token": moe.groups_per_token}
            return top_k(logits_BTE, k, bias_E=bias_E, **groups, **weighted)
        if name == "switch":
            return routers.switch(logits_BTE)
        if name == "gshard":
            draws_BT = None
            if is_training:
                draws_BT = jax.random.uniform(key, is_token_BT.shape, out_sharding=by_row)
            return routers.gshard(logits_BTE, draws_BT)
        if name == "relu":
            return routers.relu(logits_BTE, moe.max_experts_per_token)
        if name == "expert_choice":
            return balanced.expert_choice(logits_BTE, is_token_BT, k, moe.capacity_factor)
        if name == "sinkhorn" and is_training:
            iterations = moe.sinkhorn_iterations
            return balanced.sinkhorn(logits_BTE, is_token_BT, k, iterations=iterations, **weighted)
        if name == "sinkhorn":
            return routers.softmax_top_k(logits_BTE, k, **weighted)
        if name == "base":
            if not is_training:
                return balanced.greedy(logits_BTE)
            return balanced.base(logits_BTE, is_token_BT)
        if name == "random" and is_training:
            bits_BT = jax.random.bits(key, is_token_BT.shape, out_sharding=by_row)
            return routers.at_random(bits_BT, E, k)
        # Where nothing may be drawn, a random router goes by the token as well.
        return routers.hashed(jax.sharding.reshard(context.tokens_BT, by_row), E, k)

    def _summary(
        self, routed: routing.Routing, logits_BTE: jax.Array | None, is_token_BT: jax.Array
    ) -> balance.Routed:
        moe, zero = self.config, jnp.zeros((), jnp.float32)
        z_squared = even = loss = zero
        if moe.router in _SCORED:
            z_squared = balance.z_squared(logits_BTE, is_token_BT)
            even = balance.load_balance(routed, is_token_BT, moe.balance_over)
        num_tokens = jnp.sum(is_token_BT, dtype=jnp.float32)
        if moe.balance_loss:
            loss += moe.balance_loss * even
        if moe.router_z_loss:
            loss += moe.router_z_loss * z_squared / jnp.maximum(num_tokens, 1.0)
        if moe.router == "relu":
            gates_BTE = jax.nn.relu(logits_BTE)
            even = balance.relu_loss(gates_BTE, is_token_BT, moe.experts_per_token)
            loss += jax.lax.stop_gradient(self.penalty_[...]) * even
        confidence_BT = jnp.where(is_token_BT, jnp.max(routed.scores_BTE, axis=-1), 0.0)
        return balance.Routed(
            loss=loss,
            load_E=jnp.sum(routed.counts_BE(), axis=0),
            num_dropped=zero,
            num_tokens=num_tokens,
            confidence=jnp.sum(confidence_BT),
            balance=even,
            z_squared=z_squared,
        )


class SoftRouter(nnx.Module):
    """Mixtures of a row's tokens for the slots of each expert (Soft MoE, Puigcerver et al. 2023, section 2.1)."""

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        moe, dtype = config.moe, config.param_dtype
        shape = (config.embed_dim, moe.num_experts, moe.slots_per_expert)
        self.config, self.rules = moe, rules
        self.router_DEX = layers.normal_param(key, "router_DEX", shape, 1.0, rules, dtype)
        self.scale_ = layers.full_param("scale_", (), 1.0, rules, dtype)

    def __call__(
        self, x_BTD: jax.Array, context: context_lib.Context
    ) -> tuple[jax.Array, jax.Array, balance.Routed]:
        """Returns of which tokens each slot has how much and how much each token takes of it, [B, T, E, X].

        States and slots are compared by angle, times a learned scale (section 2.3).
        """
        weight_DEX = jax.sharding.reshard(
            self.router_DEX[...].astype(jnp.float32), PartitionSpec(None, None, None)
        )
        if self.config.is_router_frozen:
            weight_DEX = jax.lax.stop_gradient(weight_DEX)
        weight_DEX = self.scale_[...] * _unit(weight_DEX, axis=0)
        batch, length = self.rules.act("BT")
        logits_BTEX = jnp.einsum(
            "BTD,DEX->BTEX",
            _unit(x_BTD.astype(jnp.float32), axis=-1),
            weight_DEX,
            out_sharding=PartitionSpec(batch, length, None, None),
        )
        logits_BTEX = jax.sharding.reshard(logits_BTEX, PartitionSpec(batch, None, None, None))
        is_token_BT = jnp.ones(x_BTD.shape[:2], bool, out_sharding=PartitionSpec(batch, None))
        if context.is_token_BT is not None:
            is_token_BT = jax.sharding.reshard(context.is_token_BT, PartitionSpec(batch, None))
        is_token = is_token_BT[..., None, None]
        # A finite lowest value: rows without tokens have no NaN.
        dispatch_BTEX = jax.nn.softmax(jnp.where(is_token, logits_BTEX, -1e30), axis=1) * is_token
        combine_BTEX = jax.nn.softmax(logits_BTEX, axis=(2, 3)) * is_token
        taken_BTE = jnp.sum(combine_BTEX, axis=3)
        zero = jnp.zeros((), jnp.float32)
        summary = balance.Routed(
            loss=zero,
            load_E=jnp.sum(taken_BTE, axis=(0, 1)),
            num_dropped=zero,
            num_tokens=jnp.sum(is_token_BT, dtype=jnp.float32),
            confidence=jnp.sum(jnp.max(taken_BTE, axis=-1)),
            balance=zero,
            z_squared=zero,
        )
        return dispatch_BTEX, combine_BTEX, summary


def _unit(x: jax.Array, axis: int) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True) + 1e-6)


class Moe(nnx.Module):
    """A router, its experts, and a feed-forward part that all tokens share, if any (DeepSeekMoE, 2024)."""

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        moe, std, dtype = config.moe, config.init_stddev, config.param_dtype
        router_key, up_key, gate_key, out_key, shared_key = jax.random.split(key, 5)
        E, D, F = moe.num_experts, config.embed_dim, config.expert_width
        out_std = std / (2 * config.num_layers) ** 0.5
        self.config, self.activation, self.rules = moe, config.activation, rules
        make_router = SoftRouter if moe.router == "soft" else Router
        self.router = make_router(router_key, config, rules)
        self.up_EDF = layers.normal_param(up_key, "up_EDF", (E, D, F), std, rules, dtype)
        self.gate_EDF = (
            layers.normal_param(gate_key, "gate_EDF", (E, D, F), std, rules, dtype)
            if config.is_gated
            else None
        )
        self.out_EFD = layers.normal_param(out_key, "out_EFD", (E, F, D), out_std, rules, dtype)
        shared = dataclasses.replace(
            config, mlp_dim=moe.num_shared_experts * config.expert_width, use_bias=False
        )
        self.shared = mlp.Mlp(shared_key, shared, rules) if moe.num_shared_experts else None

    def __call__(
        self, x_BTD: jax.Array, context: context_lib.Context, key: jax.Array | None = None
    ) -> tuple[jax.Array, balance.Routed]:
        """Returns [B, T, D], zeros for what is no token but for shared experts, and what the router did.

        Args:
          x_BTD: states.
          context: with the tokens' ids and whether they are any.
          key: of a training step.
        """
        experts = self._experts(x_BTD.dtype)
        if self.config.router == "soft":
            dispatch_BTEX, combine_BTEX, summary = self.router(x_BTD, context)
            places = (x.astype(x_BTD.dtype) for x in (dispatch_BTEX, combine_BTEX))
            y_BTD = dispatch.mixed(x_BTD, *places, experts, self.rules)
        else:
            routed, summary = self.router(x_BTD, context, key)
            y_BTD, dropped = self._dispatched(x_BTD, routed, experts, key is not None)
            summary = dataclasses.replace(summary, num_dropped=dropped)
        return (y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)), summary

    def _dispatched(
        self,
        x_BTD: jax.Array,
        routed: routing.Routing,
        experts: dispatch.Experts,
        is_training: bool,
    ) -> tuple[jax.Array, jax.Array]:
        moe = self.config
        if moe.dispatch == "dense":
            return dispatch.dense(x_BTD, routed, experts, self.rules), jnp.zeros((), jnp.float32)
        if moe.dispatch == "capacity":
            factor = moe.capacity_factor
            if not is_training and moe.eval_capacity_factor is not None:
                factor = moe.eval_capacity_factor
            size = balanced.room_of_expert(
                x_BTD.shape[1], moe.num_experts, moe.experts_per_token, factor
            )
            kept = dispatch.within_capacity(routed, size)
            dropped = jnp.sum(routed.is_used_BTR, dtype=jnp.float32) - jnp.sum(
                kept.is_used_BTR, dtype=jnp.float32
            )
            return dispatch.capacity(x_BTD, kept, experts, self.rules, size), dropped
        return sort.sorted_by_expert(x_BTD, routed, experts, self.rules, moe.buffer_factor)

    def _experts(self, dtype: jax.typing.DTypeLike) -> dispatch.Experts:
        """Returns the weights in a dtype, gathered but for what lies by expert or feed-forward width."""

        def whole(weight, dims):
            return jax.sharding.reshard(weight[...].astype(dtype), self.rules.act(dims))

        gate_EDF = None if self.gate_EDF is None else whole(self.gate_EDF, "EDF")
        return dispatch.Experts(
            whole(self.up_EDF, "EDF"),
            gate_EDF,
            whole(self.out_EFD, "EFD"),
            mlp.ACTIVATIONS[self.activation],
        )
