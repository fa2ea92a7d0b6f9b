"""Qwen3 0.6B (Yang et al. 2025): norms of queries and keys, heads wider than the model's share.

    python -m llm_jax.train --config=configs/qwen3_0_6b.py --workdir=gs://BUCKET/qwen3_0_6b

Slice: v5e:4x4. Data: C4 from TFDS, prepared once by
`python -m llm_jax.prepare --config=configs/qwen3_0_6b.py` with the released tokenizer in `qwen3/`.
Expected: nobody has run this.
"""

from llm_jax import config as config_lib


def get_config(arg: str = ""):
    del arg
    config = config_lib.new()
    config.slice = "v5e:4x4"
    config.model.update(dtype="bfloat16", scan_layers=True)
    config.model.update(
        num_layers=28,
        embed_dim=1024,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=3072,
        vocab_size=151_936,
        max_length=40_960,
        rope_theta=1_000_000.0,
        norm_epsilon=1e-6,
        use_qk_norm=True,
        remat="attention_output",
    )
    config.data.update(
        source="tfds:c4/en", tokenizer="bpe:qwen3", batch_size=128, sequence_length=4096
    )
    config.optim.update(learning_rate=1e-3, warmup_steps=2000, accumulation_steps=4)
    config.train.update(num_steps=200_000, eval_every=2000, eval_steps=50)
    config.checkpoint.update(every=2000)
    return config
