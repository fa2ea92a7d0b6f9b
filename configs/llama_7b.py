"""Llama 2 7B (Touvron et al. 2023): 32 layers, full heads, 32k vocabulary, two million tokens a step.

    python -m llm_jax.train --config=configs/llama_7b.py --workdir=gs://BUCKET/llama_7b

Slice: v5e:4x8. Data: C4 from TFDS, prepared once by
`python -m llm_jax.prepare --config=configs/llama_7b.py` with the released tokenizer in `llama2/`.
Expected: not measured.
"""

from llm_jax import config as config_lib


def get_config(arg: str = ""):
    del arg
    config = config_lib.new()
    config.slice = "v5e:4x8"
    config.model.update(dtype="bfloat16", scan_layers=True)
    config.model.update(
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        mlp_dim=11_008,
        vocab_size=32_000,
        max_length=4096,
        tie_embeddings=False,
        remat="full",
    )
    config.data.update(
        source="tfds:c4/en",
        tokenizer="sentencepiece:llama2/tokenizer.model",
        batch_size=1024,
        sequence_length=2048,
    )
    config.optim.update(learning_rate=3e-4, warmup_steps=2000, accumulation_steps=16)
    config.train.update(num_steps=500_000, eval_every=2000, eval_steps=50, z_loss=1e-4)
    config.checkpoint.update(every=1000)
    return config
