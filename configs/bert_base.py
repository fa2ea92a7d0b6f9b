"""BERT-base (Devlin et al. 2019): 12 layers, post-norm, 15% of the tokens masked; no next-sentence task.

    python -m llm_jax.train --config=configs/bert_base.py --workdir=gs://BUCKET/bert_base

Slice: v5e:4x4. Data: Wikipedia from TFDS, prepared once by
`python -m llm_jax.prepare --config=configs/bert_base.py` with the released vocabulary in `bert/`.
Expected: nobody has run this to the end.
"""

from llm_jax import config as config_lib


def get_config(arg: str = ""):
    del arg
    config = config_lib.new()
    config.slice = "v5e:4x4"
    config.model.update(dtype="bfloat16", scan_layers=True)
    config.model.update(
        architecture="encoder",
        num_layers=12,
        embed_dim=768,
        num_heads=12,
        mlp_dim=3072,
        vocab_size=30_592,  # BERT's 30,522, rounded up to a multiple of 128
        max_length=512,
        positions="learned",
        norm="layernorm",
        norm_placement="post",
        norm_epsilon=1e-12,
        activation="gelu",
        is_gated=False,
        use_bias=True,
        use_embedding_norm=True,
        num_token_types=2,
        use_head_transform=True,
        use_head_bias=True,
        dropout=0.1,
        attention_dropout=0.1,
    )
    config.objective.update(name="mlm", mask_rate=0.15)
    config.data.update(
        source="tfds:wikipedia/20230601.en",
        tokenizer="bpe:bert",
        batch_size=256,
        sequence_length=512,
    )
    config.optim.update(learning_rate=1e-4, weight_decay=0.01, warmup_steps=10_000, b2=0.999)
    config.optim.update(epsilon=1e-6, schedule="linear", final_lr_fraction=0.0)
    config.train.update(num_steps=1_000_000, eval_every=10_000, eval_steps=50)
    config.checkpoint.update(every=10_000)
    return config
