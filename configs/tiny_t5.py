"""A small T5 on two centuries of addresses: spans of 15% of the tokens to restore.

    python -m llm_jax.train --config=configs/tiny_t5.py --workdir=runs/tiny_t5

Slice: none, any CPU.
Expected: validation 5.96, 5.75 and 5.65 nats a target token (of 4,224) after 200, 400 and 600 steps
(seed 0, 2026-11-23).
"""

from configs import tiny


def get_config(arg: str = ""):
    config = tiny.get_config(arg)
    config.model.update(
        architecture="encoder_decoder",
        num_layers=3,
        vocab_size=4224,  # 4,096 and 100 sentinels, rounded up
        positions="relative",
        activation="gelu_tanh",
        attention_scale=1.0,
        scale_logits=True,
    )
    # 128 tokens for the encoder leave 30 for the decoder.
    config.objective.update(name="span_corruption", target_length=30)
    return config
