"""From one language to another: a model of English to Italian goes on to French, beside one that begins with French.

    python -m experiments.tasks.data translation:fr
    python -m llm_jax.train --config=experiments/tasks/configs/transfer.py:runs/translation_it --workdir=runs/transfer_fr
    python -m llm_jax.train --config=experiments/tasks/configs/transfer.py:scratch --workdir=runs/scratch_fr
    python -m llm_jax.evaluate --workdir=runs/transfer_fr --tasks=generation \
        --source='jsonl:~/.cache/llm_jax/tasks/translation_fr/test.jsonl'

`runs/translation_it` is `configs/translation.py`'s; it keeps its vocabulary of English and Italian.
Slice: cpu. Data: sentences and titles of Debian's descriptions, the same number for both.
Expected: see `experiments/tasks/README.md`.
"""

from experiments.tasks.configs import translation
from llm_jax import start


def get_config(arg: str = "runs/translation_it"):
    config = translation.get_config("fr")
    if arg != "scratch":
        begun = start.config_of(arg)
        config.model, config.tune, config.data.tokenizer = (
            begun.model,
            begun.tune,
            begun.data.tokenizer,
        )
    config.optim.update(learning_rate=1e-3, warmup_steps=30)
    config.train.update(num_steps=300, eval_every=300)
    config.checkpoint.every = 300
    return config
