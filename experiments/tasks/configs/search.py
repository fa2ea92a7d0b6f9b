"""Search of packages by what they are for: MiniLM trained on short and long descriptions.

    python -m experiments.tasks.data descriptions
    python -m experiments.tasks.models minilm runs/minilm
    python -m llm_jax.train --config=experiments/tasks/configs/search.py:runs/minilm --workdir=runs/search
    python -m llm_jax.search evaluate --workdir=runs/search --max_length=256 \
        --pairs='~/.cache/llm_jax/tasks/descriptions/test.jsonl:query,document'

Slice: cpu. Data: 28,535 pairs, one of each source package.
Expected: see `experiments/tasks/README.md`.
"""

from llm_jax import start

FOLDER = "~/.cache/llm_jax/tasks/descriptions"


def get_config(arg: str = "runs/minilm"):
    config = start.config_of(arg)
    config.model.update(head="none", pooling="mean", use_pooler=False)
    config.objective.update(name="contrastive", temperature=0.05)
    config.data.update(source=f"jsonl:{FOLDER}/train.jsonl", batch_size=64, sequence_length=96)
    config.data.update(input_fields="query", target_field="document")
    config.data.eval_source = f"jsonl:{FOLDER}/validation.jsonl"
    config.optim.update(learning_rate=5e-5, schedule="linear", warmup_steps=40, weight_decay=0.01)
    config.optim.update(b2=0.999, final_lr_fraction=0.0)
    config.train.update(num_steps=400, eval_every=200)
    config.checkpoint.every = 200
    return config
