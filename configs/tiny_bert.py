"""A small BERT with rotary positions, norms first and gated blocks, on two centuries of addresses.

    python -m llm_jax.train --config=configs/tiny_bert.py --workdir=runs/tiny_bert

Slice: none, any CPU.
Expected: validation 6.74, 6.44 and 6.28 nats a masked token (of 4,224) after 200, 400 and 600 steps (seed 0,
2026-11-22).
"""

from configs import tiny


def get_config(arg: str = ""):
    config = tiny.get_config(arg)
    config.model.update(architecture="encoder", vocab_size=4224, use_head_transform=True)
    config.objective.update(name="mlm", mask_rate=0.15)
    return config
