"""Is a mail spam? By MiniLM, all of it trained, or by SmolLM2 with a head and low-rank updates.

    python -m experiments.tasks.data spam
    python -m experiments.tasks.models minilm runs/minilm
    python -m llm_jax.train --config=experiments/tasks/configs/spam.py:runs/minilm --workdir=runs/spam
    python -m llm_jax.evaluate --workdir=runs/spam --tasks=classification \
        --source='jsonl:~/.cache/llm_jax/tasks/spam/test.jsonl'

With `runs/smollm2` (`python -m experiments.tasks.models smollm2 runs/smollm2`) a decoder's last state is read.
Slice: cpu. Data: 3,222 mails, of which the first 128 tokens are read.
Expected: see `experiments/tasks/README.md`.
"""

from llm_jax import start

FOLDER = "~/.cache/llm_jax/tasks/spam"


def get_config(arg: str = "runs/minilm"):
    config = start.config_of(arg)
    is_encoder = config.model.architecture == "encoder"
    config.model.update(head="sequence", num_labels=2, use_pooler=False)
    config.model.pooling = "mean" if is_encoder else "last"
    config.objective.name = "sequence"
    config.data.update(source=f"jsonl:{FOLDER}/train.jsonl", sequence_length=128)
    config.data.eval_source = f"jsonl:{FOLDER}/validation.jsonl"
    config.optim.update(schedule="linear", weight_decay=0.01, b2=0.999, final_lr_fraction=0.0)
    if is_encoder:
        config.data.batch_size = 32
        config.tune.layer_decay = 0.85
        config.optim.update(learning_rate=2e-4, warmup_steps=20)
        config.train.update(num_steps=200, eval_every=100)
    else:
        config.data.batch_size = 16
        config.model.lora.update(rank=8, targets="*")
        config.optim.update(learning_rate=5e-4, warmup_steps=10)
        config.train.update(num_steps=150, eval_every=75)
    config.checkpoint.every = 100
    return config
