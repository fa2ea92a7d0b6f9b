"""From a config to a model, its parameters sharded as they are born."""

import dataclasses

import jax

from llm_jax import backend
from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.models import decoder
from llm_jax.models import encoder
from llm_jax.models import encoder_decoder

Model = decoder.Decoder | encoder.Encoder | encoder_decoder.EncoderDecoder

_FAMILIES = {
    "decoder": decoder.Decoder,
    "encoder": encoder.Encoder,
    "encoder_decoder": encoder_decoder.EncoderDecoder,
}


def resolve(config: config_lib.ModelConfig) -> config_lib.ModelConfig:
    """Returns the config with what is left to the platform decided: dtype and scan."""
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype=backend.compute_dtype())
    if config.scan_layers is None:
        config = dataclasses.replace(config, scan_layers=backend.is_scan_fast())
    return config


def make_model(key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules) -> Model:
    """Returns a freshly initialised model. Call it under `jax.jit` and a mesh."""
    return _FAMILIES[config.architecture](key, resolve(config), rules)


def abstract_model(config: config_lib.ModelConfig, rules: sharding.AxisRules) -> Model:
    """Returns the model with ShapeDtypeStructs for parameters. Call it under a mesh."""
    # The key is made inside: the mesh may be of devices that are not here.
    return jax.eval_shape(lambda: make_model(jax.random.key(0), config, rules))
