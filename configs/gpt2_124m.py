"""GPT-2 124M (Radford et al. 2019) on OpenWebText-sized data, half a million tokens a step.

    python -m llm_jax.train --config=configs/gpt2_124m.py --workdir=gs://BUCKET/gpt2_124m

Slice: v5e:4x4. Data: C4 from TFDS, prepared once by
`python -m llm_jax.prepare --config=configs/gpt2_124m.py` with a GPT-2 vocabulary in `gpt2/`.
Expected: nobody has run this to the end. GPT-2 itself reaches 3.11 nats on OpenWebText after
fine-tuning there, and nanoGPT trained from scratch 2.85 (from its README).
"""

from llm_jax import config as config_lib


def get_config(arg: str = ""):
    del arg
    config = config_lib.new()
    config.slice = "v5e:4x4"
    config.model.update(dtype="bfloat16", scan_layers=True)
    config.model.update(
        num_layers=12,
        embed_dim=768,
        num_heads=12,
        mlp_dim=3072,
        vocab_size=50304,  # GPT-2's 50,257, rounded up to a multiple of 128
        max_length=1024,
        positions="learned",
        norm="layernorm",
        activation="gelu_tanh",
        is_gated=False,
        use_bias=True,
    )
    config.data.update(
        source="tfds:c4/en", tokenizer="bpe:gpt2", batch_size=512, sequence_length=1024
    )
    config.optim.update(learning_rate=6e-4, warmup_steps=2000, accumulation_steps=4)
    config.train.update(num_steps=600_000, eval_every=2000, eval_steps=50)
    config.checkpoint.update(every=2000)
    return config
