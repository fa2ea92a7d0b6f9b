"""Lines that are missing in the middle of a file of Python (Bavarian et al. 2022), by SmolLM2 with low-rank updates.

    python -m experiments.tasks.data python_fill
    python -m experiments.tasks.models smollm2 runs/smollm2
    python -m llm_jax.train --config=experiments/tasks/configs/fill.py:runs/smollm2 --workdir=runs/fill
    python -m llm_jax.evaluate --workdir=runs/fill --tasks=generation --max_tokens=96 \
        --source='jsonl:~/.cache/llm_jax/tasks/python_fill/test.jsonl'
    python -m experiments.tasks.syntax --workdir=runs/fill

Slice: cpu. Data: 1,205 holes of one to five lines, with some 600 characters before and behind them.
Expected: see `experiments/tasks/README.md`.
"""

from llm_jax import start

FOLDER = "~/.cache/llm_jax/tasks/python_fill"


def get_config(arg: str = "runs/smollm2"):
    config = start.config_of(arg)
    config.model.lora.update(rank=16, targets="*")
    config.objective.name = "seq2seq"
    config.data.update(source=f"jsonl:{FOLDER}/train.jsonl", batch_size=2, sequence_length=512)
    config.data.update(input_fields="before,after", target_field="middle")
    config.data.eval_source = f"jsonl:{FOLDER}/validation.jsonl"
    config.optim.update(learning_rate=1e-3, schedule="linear", warmup_steps=10, weight_decay=0.0)
    config.optim.final_lr_fraction = 0.0
    config.train.update(num_steps=140, eval_every=70, eval_steps=20)
    config.checkpoint.every = 70
    return config
