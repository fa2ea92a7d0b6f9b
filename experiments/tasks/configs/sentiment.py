"""Does a sentence of a film review like the film? By MiniLM, all of it trained.

    python -m experiments.tasks.data sentiment
    python -m experiments.tasks.models minilm runs/minilm
    python -m llm_jax.train --config=experiments/tasks/configs/sentiment.py:runs/minilm --workdir=runs/sentiment
    python -m llm_jax.evaluate --workdir=runs/sentiment --tasks=classification \
        --source='jsonl:~/.cache/llm_jax/tasks/sentiment/test.jsonl'

Slice: cpu. Data: 7,376 sentences, twice; half of them have less than 20 words, none more than 53.
Expected: see `experiments/tasks/README.md`.
"""

from llm_jax import start

FOLDER = "~/.cache/llm_jax/tasks/sentiment"


def get_config(arg: str = "runs/minilm"):
    config = start.config_of(arg)
    config.model.update(head="sequence", num_labels=2, use_pooler=False, pooling="mean")
    config.objective.name = "sequence"
    config.data.update(source=f"jsonl:{FOLDER}/train.jsonl", sequence_length=64, batch_size=32)
    config.data.eval_source = f"jsonl:{FOLDER}/validation.jsonl"
    config.tune.layer_decay = 0.85
    config.optim.update(schedule="linear", weight_decay=0.01, b2=0.999, final_lr_fraction=0.0)
    config.optim.update(learning_rate=2e-4, warmup_steps=40)
    config.train.update(num_steps=460, eval_every=115)
    config.checkpoint.every = 230
    return config
