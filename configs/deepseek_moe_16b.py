"""DeepSeekMoE 16B (Dai et al. 2024): 64 small experts of which a token has six, and two that all share.

    python -m llm_jax.train --config=configs/deepseek_moe_16b.py --workdir=gs://BUCKET/deepseek_moe_16b

Slice: v5p:4x4x4; for v5e:8x8 the compiler has no exchange of ragged rows. Data: C4 from TFDS, prepared once by
`python -m llm_jax.prepare --config=configs/deepseek_moe_16b.py` with the released tokenizer in `deepseek/`.
Expected: not measured.
"""

from llm_jax import config as config_lib


def get_config(arg: str = ""):
    del arg
    config = config_lib.new()
    config.slice = "v5p:4x4x4"
    config.model.update(dtype="bfloat16", scan_layers=True)
    config.model.update(
        num_layers=28,
        embed_dim=2048,
        num_heads=16,
        mlp_dim=10_944,
        vocab_size=102_400,
        max_length=4096,
        norm_epsilon=1e-6,
        tie_embeddings=False,
        remat="full",
    )
    config.model.moe.update(
        num_experts=64,
        experts_per_token=6,
        expert_dim=1408,
        num_shared_experts=2,
        first_dense_layers=1,
        normalise_weights=False,
        balance_loss=0.001,
        buffer_factor=2.0,
    )
    config.mesh.update(rules="fsdp_ep", expert=16)
    config.data.update(
        source="tfds:c4/en", tokenizer="bpe:deepseek", batch_size=256, sequence_length=4096
    )
    config.optim.update(learning_rate=4.2e-4, warmup_steps=2000, accumulation_steps=4)
    config.train.update(num_steps=100_000, eval_every=2000, eval_steps=50)
    config.checkpoint.update(every=1000)
    return config
