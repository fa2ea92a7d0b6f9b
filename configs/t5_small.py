"""T5-small (Raffel et al. 2020): encoder and decoder of 6 layers, spans of 15% of the tokens to restore.

    python -m llm_jax.train --config=configs/t5_small.py --workdir=gs://BUCKET/t5_small

Slice: v5e:4x4. Data: C4 from TFDS, prepared once by
`python -m llm_jax.prepare --config=configs/t5_small.py` with the released `t5/spiece.model`.
Expected: nobody has run this to the end.
"""

from llm_jax import config as config_lib


def get_config(arg: str = ""):
    del arg
    config = config_lib.new()
    config.slice = "v5e:4x4"
    config.model.update(dtype="bfloat16", scan_layers=True)
    config.model.update(
        architecture="encoder_decoder",
        num_layers=6,
        embed_dim=512,
        num_heads=8,
        head_dim=64,
        mlp_dim=2048,
        vocab_size=32_128,
        max_length=512,
        positions="relative",
        relative_buckets=32,
        relative_max_distance=128,
        norm_epsilon=1e-6,
        activation="relu",
        is_gated=False,
        attention_scale=1.0,
        scale_logits=True,
    )
    # 15% in spans of 3: 512 tokens for the encoder leave 114 for the decoder.
    config.objective.update(name="span_corruption", target_length=114)
    config.data.update(
        source="tfds:c4/en",
        tokenizer="sentencepiece:t5/spiece.model",
        batch_size=128,
        sequence_length=512,
    )
    config.optim.update(name="adafactor", learning_rate=1e-2, weight_decay=0.0)
    config.optim.update(schedule="inverse_sqrt", warmup_steps=10_000)
    config.train.update(num_steps=524_288, eval_every=10_000, eval_steps=50)
    config.checkpoint.update(every=10_000)
    return config
