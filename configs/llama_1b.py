"""Llama 3.2 1B (Grattafiori et al. 2024): 16 layers, grouped heads, 128k vocabulary.

    python -m llm_jax.train --config=configs/llama_1b.py --workdir=gs://BUCKET/llama_1b

Slice: v5e:4x4. Data: C4 from TFDS, prepared once by
`python -m llm_jax.prepare --config=configs/llama_1b.py` with the released tokenizer in `llama3/`.
Expected: not measured.
"""

from llm_jax import config as config_lib


def get_config(arg: str = ""):
    del arg
    config = config_lib.new()
    config.slice = "v5e:4x4"
    config.model.update(dtype="bfloat16", scan_layers=True)
    config.model.update(
        num_layers=16,
        embed_dim=2048,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=8192,
        vocab_size=128_256,
        max_length=131_072,
        rope_theta=500_000.0,
        rope_scaling="llama3",
        rope_scaling_factor=32.0,
        remat="full",
    )
    config.data.update(
        source="tfds:c4/en", tokenizer="bpe:llama3", batch_size=128, sequence_length=2048
    )
    config.optim.update(learning_rate=3e-4, warmup_steps=2000, accumulation_steps=4)
    config.train.update(num_steps=100_000, eval_every=2000, eval_steps=50, z_loss=1e-4)
    config.checkpoint.update(every=1000)
    return config
