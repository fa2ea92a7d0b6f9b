"""Short answers with a memory: SmolLM2 learns conversations on words and packages by low-rank updates.

    python -m experiments.tasks.data conversations
    python -m experiments.tasks.models smollm2 runs/smollm2
    python -m llm_jax.train --config=experiments/tasks/configs/chat.py:runs/smollm2 --workdir=runs/chat
    python -m llm_jax.evaluate --workdir=runs/chat --tasks=chat --max_tokens=24 \
        --source='jsonl:~/.cache/llm_jax/tasks/conversations/test.jsonl'
    python -m llm_jax.sampling.chat --workdir=runs/chat --temperature=0

What the model did before: `--workdir=runs/smollm2` with this config, to `llm_jax.evaluate`.
Slice: cpu. Data: 24,000 conversations of four messages, of which a tenth is read.
Expected: see `experiments/tasks/README.md`.
"""

from llm_jax import start

FOLDER = "~/.cache/llm_jax/tasks/conversations"


def get_config(arg: str = "runs/smollm2"):
    config = start.config_of(arg)
    config.model.lora.update(rank=16, targets="*")
    config.objective.name = "chat"
    config.data.update(source=f"jsonl:{FOLDER}/train.jsonl", batch_size=4, sequence_length=256)
    config.data.input_fields = "messages"
    config.data.eval_source = f"jsonl:{FOLDER}/validation.jsonl"
    config.optim.update(learning_rate=5e-4, schedule="linear", warmup_steps=20, weight_decay=0.0)
    config.optim.final_lr_fraction = 0.0
    config.train.update(num_steps=200, eval_every=100, eval_steps=40)
    config.checkpoint.every = 100
    return config
