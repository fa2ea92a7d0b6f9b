"""nanoGPT's CPU shape, on bytes: the quality anchor.

    python -m llm_jax.train --config=configs/char.py --workdir=runs/char

Slice: none, any CPU.
Expected: validation 1.793 nats a byte after 2,000 steps (seeds 0, 1, 2: 1.800, 1.790, 1.790;
2026-11-22), a minute or two on two cores with AMX. nanoGPT's architecture in PyTorch reached 1.793.
"""

from llm_jax import config as config_lib


def get_config(arg: str = ""):
    del arg
    config = config_lib.new()
    config.model.update(
        num_layers=4,
        embed_dim=128,
        num_heads=4,
        vocab_size=256,
        max_length=64,
        positions="learned",
        norm="layernorm",
        activation="gelu_tanh",  # GPT-2's own; the exact one costs a CPU a third of the step
        is_gated=False,
    )
    config.data.update(batch_size=12, sequence_length=64, packing="concat")
    config.optim.update(learning_rate=1e-3, warmup_steps=100, b2=0.99, weight_decay=0.1)
    config.train.update(num_steps=2000, eval_every=1000, log_every=50)
    config.checkpoint.update(every=1000)
    return config
