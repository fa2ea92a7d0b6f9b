"""SmolLM2 135M (Allal et al. 2025): a Llama of 30 thin layers, 3 heads of keys.

    python -m llm_jax.train --config=configs/smollm2_135m.py --workdir=gs://BUCKET/smollm2_135m

Slice: v5e:4x4. Data: C4 from TFDS, prepared once by
`python -m llm_jax.prepare --config=configs/smollm2_135m.py` with the released tokenizer in `smollm2/`.
Expected: nobody has run this. The released weights convert: `python -m llm_jax.convert --help`.
"""

from llm_jax import config as config_lib


def get_config(arg: str = ""):
    del arg
    config = config_lib.new()
    config.slice = "v5e:4x4"
    config.model.update(dtype="bfloat16", scan_layers=True)
    config.model.update(
        num_layers=30,
        embed_dim=576,
        num_heads=9,
        num_kv_heads=3,
        mlp_dim=1536,
        vocab_size=49_152,
        max_length=8192,
        rope_theta=100_000.0,
        remat="attention_output",
    )
    config.data.update(
        source="tfds:c4/en", tokenizer="bpe:smollm2", batch_size=512, sequence_length=2048
    )
    config.optim.update(learning_rate=3e-3, warmup_steps=2000, accumulation_steps=4)
    config.optim.update(schedule="wsd", final_lr_fraction=0.0)
    config.train.update(num_steps=1_000_000, eval_every=5000, eval_steps=50)
    config.checkpoint.update(every=5000)
    return config
