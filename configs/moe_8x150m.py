"""A small mixture of experts: GPT-2's size for each token, of eight times its feed-forward parts.

    python -m llm_jax.train --config=configs/moe_8x150m.py --workdir=gs://BUCKET/moe_8x150m

Slice: v5e:4x4. Data: as `gpt2_124m`.
Expected: not measured.
"""

from configs import gpt2_124m


def get_config(arg: str = ""):
    config = gpt2_124m.get_config(arg)
    config.model.update(positions="rope", norm="rmsnorm", activation="silu", is_gated=True)
    config.model.update(use_bias=False, mlp_dim=1024, remat="full")
    config.model.moe.update(num_experts=8, experts_per_token=2, router_z_loss=1e-3)
    # Each device keeps twice the slots that an even load sends; what is more is dropped, and counted.
    config.model.moe.buffer_factor = 2.0
    config.mesh.update(rules="fsdp_ep", expert=4)
    return config
