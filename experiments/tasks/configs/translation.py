"""Translation of package descriptions, from scratch: an encoder-decoder, or a decoder that is given the source.

    python -m experiments.tasks.data translation:it
    python -m llm_jax.train --config=experiments/tasks/configs/translation.py --workdir=runs/translation_it
    python -m llm_jax.evaluate --workdir=runs/translation_it --tasks=generation --num_beams=4 \
        --source='jsonl:~/.cache/llm_jax/tasks/translation_it/test.jsonl'

    --config=experiments/tasks/configs/translation.py:it,decoder      a decoder alone

Slice: cpu. Data: 98,612 sentences and titles; a vocabulary of 8,000 is trained on both languages.
Expected: see `experiments/tasks/README.md`.
"""

from llm_jax import config as config_lib


def get_config(arg: str = ""):
    language, _, architecture = arg.partition(",")
    folder = f"~/.cache/llm_jax/tasks/translation_{language or 'it'}"
    config = config_lib.new()
    is_pair = architecture != "decoder"
    config.model.update(
        architecture="encoder_decoder" if is_pair else "decoder",
        num_layers=3 if is_pair else 6,
        embed_dim=256,
        num_heads=4,
        mlp_dim=768,
        vocab_size=8064,
        max_length=256,
        dropout=0.1,
    )
    config.objective.update(name="seq2seq", target_length=128)
    config.data.update(source=f"jsonl:{folder}/train.jsonl", input_fields="source")
    config.data.update(target_field="target", tokenizer="train_bpe:8000")
    config.data.eval_source = f"jsonl:{folder}/validation.jsonl"
    config.data.update(batch_size=16, sequence_length=128 if is_pair else 256)
    config.optim.update(learning_rate=2e-3, warmup_steps=200, weight_decay=0.05, b2=0.98)
    config.optim.final_lr_fraction = 0.02
    config.train.update(num_steps=3000, eval_every=1000)
    config.checkpoint.every = 1000
    return config
