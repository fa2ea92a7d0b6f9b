"""What is X? SmolLM2 learns by low-rank updates to answer as WordNet and FOLDOC do.

    python -m experiments.tasks.data definitions
    python -m experiments.tasks.models smollm2 runs/smollm2
    python -m llm_jax.train --config=experiments/tasks/configs/definitions.py:runs/smollm2 --workdir=runs/definitions
    python -m llm_jax.evaluate --workdir=runs/definitions --tasks=generation --max_tokens=40 \
        --source='jsonl:~/.cache/llm_jax/tasks/definitions/test.jsonl'

Slice: cpu. Data: 91,234 questions, of which some 6,000 are read; no term is in two splits.
Expected: see `experiments/tasks/README.md`.
"""

from llm_jax import start

FOLDER = "~/.cache/llm_jax/tasks/definitions"


def get_config(arg: str = "runs/smollm2"):
    config = start.config_of(arg)
    config.model.lora.update(rank=16, targets="*")
    config.objective.name = "seq2seq"
    config.data.update(source=f"jsonl:{FOLDER}/train.jsonl", batch_size=8, sequence_length=96)
    config.data.update(input_fields="question", target_field="answer")
    config.data.eval_source = f"jsonl:{FOLDER}/validation.jsonl"
    config.optim.update(learning_rate=5e-4, schedule="linear", warmup_steps=20, weight_decay=0.0)
    config.optim.final_lr_fraction = 0.0
    config.train.update(num_steps=200, eval_every=100)
    config.checkpoint.every = 100
    return config
