"""20 Newsgroups by MiniLM, all of it trained: which of twenty groups a post is from.

    python -m experiments.tasks.data newsgroups
    python -m experiments.tasks.models minilm runs/minilm
    python -m llm_jax.train --config=experiments/tasks/configs/newsgroups.py:runs/minilm --workdir=runs/newsgroups
    python -m llm_jax.evaluate --workdir=runs/newsgroups --tasks=classification \
        --source='jsonl:~/.cache/llm_jax/tasks/newsgroups/test.jsonl'

Slice: cpu. Data: 10,093 posts, of which the first 256 tokens are read.
Expected: see `experiments/tasks/README.md`.
"""

from llm_jax import start

FOLDER = "~/.cache/llm_jax/tasks/newsgroups"


def get_config(arg: str = "runs/minilm"):
    config = start.config_of(arg)
    config.model.update(
        head="sequence", num_labels=20, pooling="mean", use_pooler=False, dropout=0.1
    )
    config.objective.name = "sequence"
    config.data.update(source=f"jsonl:{FOLDER}/train.jsonl", batch_size=32, sequence_length=256)
    config.data.eval_source = f"jsonl:{FOLDER}/validation.jsonl"
    config.tune.layer_decay = 0.85
    config.optim.update(learning_rate=3e-4, schedule="linear", warmup_steps=60, weight_decay=0.01)
    config.optim.update(b2=0.999, final_lr_fraction=0.0)
    config.train.update(num_steps=950, eval_every=300)
    config.checkpoint.every = 300
    return config
