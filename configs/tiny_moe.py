"""The demo with experts: eight feed-forward parts in each layer, of which a token runs the best two.

    python -m llm_jax.train --config=configs/tiny_moe.py --workdir=runs/tiny_moe

Slice: none, any CPU. Two experts of half the width each: a token costs what it costs in `tiny.py`.
Expected: not measured.
"""

from configs import tiny


def get_config(arg: str = ""):
    config = tiny.get_config(arg)
    config.model.moe.update(num_experts=8, experts_per_token=2, expert_dim=352)
    return config
