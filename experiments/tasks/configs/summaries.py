"""What a package is, in a line: SmolLM2 learns by low-rank updates to write short descriptions of long ones.

    python -m experiments.tasks.data summaries
    python -m experiments.tasks.models smollm2 runs/smollm2
    python -m llm_jax.train --config=experiments/tasks/configs/summaries.py:runs/smollm2 --workdir=runs/summaries
    python -m llm_jax.evaluate --workdir=runs/summaries --tasks=generation --max_tokens=24 \
        --source='jsonl:~/.cache/llm_jax/tasks/summaries/test.jsonl'

Slice: cpu. Data: 28,535 descriptions, of which some 5,000 are read; no source package is in two splits.
Expected: see `experiments/tasks/README.md`.
"""

from llm_jax import start

FOLDER = "~/.cache/llm_jax/tasks/summaries"


def get_config(arg: str = "runs/smollm2"):
    config = start.config_of(arg)
    config.model.lora.update(rank=16, targets="*")
    config.objective.name = "seq2seq"
    config.data.update(source=f"jsonl:{FOLDER}/train.jsonl", batch_size=4, sequence_length=256)
    config.data.update(input_fields="long", target_field="short")
    config.data.eval_source = f"jsonl:{FOLDER}/validation.jsonl"
    config.optim.update(learning_rate=5e-4, schedule="linear", warmup_steps=20, weight_decay=0.0)
    config.optim.final_lr_fraction = 0.0
    config.train.update(num_steps=400, eval_every=200)
    config.train.eval_steps = 40
    config.checkpoint.every = 200
    return config
