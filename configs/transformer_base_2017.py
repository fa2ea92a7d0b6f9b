"""The Transformer (Vaswani et al. 2017), base model, on English to German.

    python -m llm_jax.train --config=configs/transformer_base_2017.py --workdir=gs://BUCKET/transformer

Slice: v5e:2x2. Data: WMT 2014 from TFDS, prepared once by
`python -m llm_jax.prepare --config=configs/transformer_base_2017.py`, with a vocabulary of 37,000 that it
trains on both languages. The paper smooths labels by 0.1 and averages its last checkpoints; this does not.
Expected: nobody has run this to the end; the paper reports 27.3 BLEU.
"""

from llm_jax import config as config_lib


def get_config(arg: str = ""):
    del arg
    config = config_lib.new()
    config.slice = "v5e:2x2"
    config.model.update(dtype="bfloat16", scan_layers=True)
    config.model.update(
        architecture="encoder_decoder",
        num_layers=6,
        embed_dim=512,
        num_heads=8,
        mlp_dim=2048,
        vocab_size=37_000,
        max_length=256,
        positions="sinusoidal",
        scale_embeddings=True,
        norm="layernorm",
        norm_placement="post",
        norm_epsilon=1e-6,
        activation="relu",
        is_gated=False,
        use_bias=True,
        dropout=0.1,
    )
    config.objective.update(name="seq2seq", target_length=256)
    config.data.update(
        source="tfds:wmt14_translate/de-en",
        input_fields="en",
        target_field="de",
        tokenizer="train_bpe:37000",
        batch_size=128,
        sequence_length=256,
    )
    # width^-0.5 * min(step^-0.5, step * warmup^-1.5), equation 3.
    config.optim.update(learning_rate=7e-4, schedule="inverse_sqrt", warmup_steps=4000)
    config.optim.update(b2=0.98, epsilon=1e-9, weight_decay=0.0, clip_norm=None)
    config.train.update(num_steps=100_000, eval_every=5000)
    config.checkpoint.update(every=5000)
    return config
