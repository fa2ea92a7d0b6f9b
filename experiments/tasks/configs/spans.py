"""Answers that stand in the text: MiniLM points at the definition of a term among definitions of others.

    python -m experiments.tasks.data spans
    python -m experiments.tasks.models minilm runs/minilm
    python -m llm_jax.train --config=experiments/tasks/configs/spans.py:runs/minilm --workdir=runs/spans
    python -m llm_jax.evaluate --workdir=runs/spans --tasks=spans \
        --source='jsonl:~/.cache/llm_jax/tasks/spans/test.jsonl'

Slice: cpu. Data: 91,234 questions, of which 12,000 are read.
Expected: see `experiments/tasks/README.md`.
"""

from llm_jax import start

FOLDER = "~/.cache/llm_jax/tasks/spans"


def get_config(arg: str = "runs/minilm"):
    config = start.config_of(arg)
    config.model.update(head="span", use_pooler=False, dropout=0.1)
    config.objective.name = "span"
    config.data.update(source=f"jsonl:{FOLDER}/train.jsonl", batch_size=48, sequence_length=160)
    config.data.update(input_fields="question,context", target_field="answer")
    config.data.eval_source = f"jsonl:{FOLDER}/validation.jsonl"
    config.optim.update(learning_rate=2e-4, schedule="linear", warmup_steps=40, weight_decay=0.01)
    config.optim.update(b2=0.999, final_lr_fraction=0.0)
    config.train.update(num_steps=250, eval_every=125)
    config.checkpoint.every = 125
    return config
