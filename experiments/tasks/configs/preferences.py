"""A line rather than a sentence: direct preference optimisation of SmolLM2, by low-rank updates.

    python -m experiments.tasks.data preferences
    python -m experiments.tasks.models smollm2 runs/smollm2
    python -m llm_jax.train --config=experiments/tasks/configs/preferences.py:runs/smollm2 --workdir=runs/preferences
    python -m llm_jax.evaluate --workdir=runs/preferences --tasks=preferences \
        --source='jsonl:~/.cache/llm_jax/tasks/preferences/test.jsonl'

Slice: cpu. Data: pairs of a short description and the first sentence of the long one, of which 240 are read.
Expected: see `experiments/tasks/README.md`.
"""

from llm_jax import start

FOLDER = "~/.cache/llm_jax/tasks/preferences"


def get_config(arg: str = "runs/smollm2"):
    config = start.config_of(arg)
    config.model.lora.update(rank=16, targets="*")
    config.objective.update(name="preference", beta=0.1)
    config.data.update(source=f"jsonl:{FOLDER}/train.jsonl", batch_size=4, sequence_length=320)
    config.data.update(input_fields="prompt", target_field="chosen,rejected", packing="none")
    config.data.eval_source = f"jsonl:{FOLDER}/validation.jsonl"
    config.optim.update(learning_rate=1e-4, schedule="linear", warmup_steps=10, weight_decay=0.0)
    config.optim.final_lr_fraction = 0.0
    config.train.update(num_steps=60, eval_every=30, eval_steps=8)
    config.checkpoint.every = 30
    return config
