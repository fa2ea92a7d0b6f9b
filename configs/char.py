"""x"""

from llm_jax import config as config_lib


def get_config(arg=""):
    config = config_lib.new()
    config.model.update(
        num_layers=4,
        num_heads=4,
        embed_dim=128,
        max_length=64,
        positions="learned",
        norm="layernorm",
        activation="gelu_tanh",
        is_gated=False,
    )
    config.data.update(batch_size=12, sequence_length=64, packing="concat")
    config.optim.update(b2=0.99)
    config.train.update(num_steps=2000, eval_every=1000, log_every=50)
    config.checkpoint.every = 500
    return config
