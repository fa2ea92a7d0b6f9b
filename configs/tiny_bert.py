"""A small BERT with rotary positions, norms first and gated blocks, on two centuries of addresses.

    python -m llm_jax.train --config=configs/tiny_bert.py --workdir=runs/tiny_bert

Slice: none, any CPU.
Expected: see the README's table of small runs.
"""

from configs import tiny


def get_config(arg: str = ""):
    config = tiny.get_config(arg)
    config.model.update(architecture="encoder", vocab_size=4224, use_head_transform=True)
    config.objective.update(name="mlm", mask_rate=0.15)
    return config
