"""Switch-Base (Fedus et al. 2021): T5-base with 128 experts in every other layer, one of them a token.

    python -m llm_jax.train --config=configs/switch_base.py --workdir=gs://BUCKET/switch_base

Slice: v5e:8x8. Data: as `t5_base`.
Expected: not measured.
"""

from configs import t5_base


def get_config(arg: str = ""):
    config = t5_base.get_config(arg)
    config.slice = "v5e:8x8"
    config.model.remat = "full"
    # Section 2.2 and table 9 there: places for a quarter more than an even share, twice in evaluation.
    config.model.moe.update(
        num_experts=128,
        experts_per_token=1,
        every=2,
        router="switch",
        jitter=0.01,
        dispatch="capacity",
        capacity_factor=1.25,
        eval_capacity_factor=2.0,
        balance_loss=0.01,
    )
    config.mesh.update(rules="fsdp_ep", expert=16)
    return config
