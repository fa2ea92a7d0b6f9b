"""Python, by SmolLM2 with low-rank updates: perplexity of the standard library, and what is forgotten for it.

    python -m experiments.tasks.data python_code
    python -m experiments.tasks.models smollm2 runs/smollm2
    python -m llm_jax.train --config=experiments/tasks/configs/code.py:runs/smollm2 --workdir=runs/code
    python -m llm_jax.evaluate --workdir=runs/code --tasks=perplexity \
        --source='jsonl:~/.cache/llm_jax/tasks/python_code/test.jsonl:text'

    --config=experiments/tasks/configs/code.py:runs/smollm2,replay      a quarter of the rows are presidents' addresses

What it has forgotten is how well it does on such addresses: `experiments/tasks/configs/addresses.py`.
Slice: cpu. Data: 337 files, of which a part is read.
Expected: see `experiments/tasks/README.md`.
"""

from llm_jax import start

FOLDER = "~/.cache/llm_jax/tasks/python_code"


def get_config(arg: str = "runs/smollm2"):
    workdir, _, replay = arg.partition(",")
    config = start.config_of(workdir)
    config.model.lora.update(rank=16, targets="*")
    config.data.update(source=f"jsonl:{FOLDER}/train.jsonl:text", batch_size=4, sequence_length=256)
    config.data.eval_source = f"jsonl:{FOLDER}/validation.jsonl:text"
    if replay:
        config.data.mixture = "0.25=tfds:state_of_the_union"
    config.optim.update(learning_rate=1e-3, schedule="linear", warmup_steps=10, weight_decay=0.0)
    config.optim.final_lr_fraction = 0.0
    config.train.update(num_steps=120, eval_every=60, eval_steps=20)
    config.checkpoint.every = 60
    return config
