"""Which words of a sentence are things, doings and qualities: MiniLM labels them, for a graph of what is related.

    python -m experiments.tasks.data relations
    python -m experiments.tasks.models minilm runs/minilm
    python -m llm_jax.train --config=experiments/tasks/configs/entities.py:runs/minilm --workdir=runs/entities
    python -m llm_jax.evaluate --workdir=runs/entities --tasks=classification \
        --source='jsonl:~/.cache/llm_jax/tasks/relations/test.jsonl'

`experiments/tasks/configs/relations.py` names the relations between them.
Slice: cpu. Data: sentences made of WordNet's glosses, of which 6,400 are read.
Expected: see `experiments/tasks/README.md`.
"""

from llm_jax import start

FOLDER = "~/.cache/llm_jax/tasks/relations"


def get_config(arg: str = "runs/minilm"):
    config = start.config_of(arg)
    config.model.update(head="token", num_labels=7, use_pooler=False, dropout=0.1)
    config.objective.name = "token"
    config.data.update(source=f"jsonl:{FOLDER}/train.jsonl", batch_size=32, sequence_length=64)
    config.data.update(input_fields="words", target_field="labels", packing="none")
    config.data.eval_source = f"jsonl:{FOLDER}/validation.jsonl"
    config.optim.update(learning_rate=3e-4, schedule="linear", warmup_steps=20, weight_decay=0.01)
    config.optim.update(b2=0.999, final_lr_fraction=0.0)
    config.train.update(num_steps=200, eval_every=100)
    config.checkpoint.every = 100
    return config
