"""The demo: a small Llama-shaped model on two centuries of addresses to the Congress.

    python -m llm_jax.train --config=configs/tiny.py --workdir=runs/tiny

Slice: none, any CPU.
Expected: validation below 5 nats a token (of 4,096), under 1.9 bits a byte, in some minutes.
"""

from llm_jax import config as config_lib


def get_config(arg: str = ""):
    del arg
    config = config_lib.new()
    config.model.update(
        num_layers=4, embed_dim=256, num_heads=4, mlp_dim=704, vocab_size=4096, max_length=512
    )
    config.data.update(tokenizer="train_bpe:4096", batch_size=16, sequence_length=128)
    config.optim.update(learning_rate=2e-3, warmup_steps=50)
    config.train.update(num_steps=600, eval_every=200, eval_steps=20)
    config.checkpoint.update(every=300, max_to_keep=2)
    return config
