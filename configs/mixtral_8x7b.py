"""Mixtral 8x7B (Jiang et al. 2024): 47 billion parameters, of which a token runs 13.

    python -m llm_jax.train --config=configs/mixtral_8x7b.py --workdir=gs://BUCKET/mixtral_8x7b

Slice: v5p:4x4x4. Data: C4 from TFDS, prepared once by
`python -m llm_jax.prepare --config=configs/mixtral_8x7b.py` with the released tokenizer in `mixtral/`.
Expected: not measured. The released weights convert: `python -m llm_jax.convert from-hf`.
"""

from llm_jax import config as config_lib


def get_config(arg: str = ""):
    del arg
    config = config_lib.new()
    config.slice = "v5p:4x4x4"
    config.model.update(dtype="bfloat16", scan_layers=True)
    config.model.update(
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=14_336,
        vocab_size=32_000,
        max_length=32_768,
        rope_theta=1_000_000.0,
        tie_embeddings=False,
        remat="full",
    )
    config.model.moe.update(num_experts=8, experts_per_token=2, balance_loss=0.02)
    # Each device keeps twice the slots that an even load sends; what is more is dropped, and counted.
    config.model.moe.buffer_factor = 2.0
    config.mesh.update(rules="fsdp_ep", expert=4)
    config.data.update(
        source="tfds:c4/en", tokenizer="bpe:mixtral", batch_size=256, sequence_length=4096
    )
    config.optim.update(learning_rate=1e-4, warmup_steps=2000)
    config.train.update(num_steps=100_000, eval_every=2000, eval_steps=50)
    config.checkpoint.update(every=1000)
    return config
