"""The feed-forward block: plain, or gated by a second projection (Shazeer 2020)."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.models import layers
from llm_jax.models import lora
from llm_jax.models import parametrisation

ACTIVATIONS = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


class Mlp(nnx.Module):
    """`out(activation(up(x)))`, or `out(activation(gate(x)) * up(x))` where gated."""

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        D, F, dtype = config.embed_dim, config.mlp_width, config.param_dtype
        up_key, gate_key, out_key = jax.random.split(key, 3)
        std, out_std = parametrisation.hidden_stddev(config), parametrisation.branch_stddev(config)
        self.activation, self.rules = config.activation, rules
        self.up_DF = layers.normal_param(up_key, "up_DF", (D, F), std, rules, dtype)
        self.out_FD = layers.normal_param(out_key, "out_FD", (F, D), out_std, rules, dtype)
        self.gate_DF = (
            layers.normal_param(gate_key, "gate_DF", (D, F), std, rules, dtype)
            if config.is_gated
            else None
        )
        has_bias = config.use_bias
        self.up_bias_F = layers.bias_param(has_bias, "up_bias_F", (F,), rules, dtype)
        self.gate_bias_F = layers.bias_param(
            has_bias and config.is_gated, "gate_bias_F", (F,), rules, dtype
        )
        self.out_bias_D = layers.bias_param(has_bias, "out_bias_D", (D,), rules, dtype)
        self.lora = lora.make("mlp", key, self, config, rules)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns [B, T, D]."""
        activate = ACTIVATIONS[self.activation]
        spec = self.rules.act("BTF")
        up, out = lora.matrix(self, "up_DF"), lora.matrix(self, "out_FD")
        up_BTF = layers.project("BTD,DF->BTF", x_BTD, up, self.up_bias_F, spec)
        if self.gate_DF is None:
            h_BTF = activate(up_BTF)
        else:
            gate = lora.matrix(self, "gate_DF")
            gate_BTF = layers.project("BTD,DF->BTF", x_BTD, gate, self.gate_bias_F, spec)
            h_BTF = activate(gate_BTF) * up_BTF
        return layers.project("BTF,FD->BTD", h_BTF, out, self.out_bias_D, self.rules.act("BTD"))
