"""Gemma 3 1B (Kamath et al. 2025): five local layers to a global one, norms on both sides of a branch.

    python -m llm_jax.train --config=configs/gemma3_1b.py --workdir=gs://BUCKET/gemma3_1b

Slice: v5e:4x4. Data: C4 from TFDS, prepared once by
`python -m llm_jax.prepare --config=configs/gemma3_1b.py` with the released tokenizer in `gemma3/`.
Expected: nobody has run this.
"""

from llm_jax import config as config_lib


def get_config(arg: str = ""):
    del arg
    config = config_lib.new()
    config.slice = "v5e:4x4"
    config.model.update(dtype="bfloat16", scan_layers=True)
    config.model.update(
        num_layers=26,
        embed_dim=1152,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        mlp_dim=6912,
        vocab_size=262_144,
        max_length=32_768,
        rope_theta=1_000_000.0,
        rope_local_theta=10_000.0,
        window=512,
        layer_pattern="LLLLLG",
        norm_placement="sandwich",
        norm_epsilon=1e-6,
        norm_offset=True,
        use_qk_norm=True,
        scale_embeddings=True,
        activation="gelu_tanh",
        remat="full",
    )
    config.data.update(
        source="tfds:c4/en", tokenizer="bpe:gemma3", batch_size=128, sequence_length=4096
    )
    config.optim.update(learning_rate=1e-3, warmup_steps=2000, accumulation_steps=4)
    config.train.update(num_steps=200_000, eval_every=2000, eval_steps=50)
    config.checkpoint.update(every=2000)
    return config
