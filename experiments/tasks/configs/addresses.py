"""Presidents' addresses of 2005 and later, to score a model on that learned something else.

    python -m llm_jax.evaluate --workdir=runs/code --tasks=perplexity --split=test \
        --config=experiments/tasks/configs/addresses.py:runs/smollm2

Slice: cpu. Data: the embedded corpus.
Expected: see `experiments/tasks/README.md`.
"""

from llm_jax import start


def get_config(arg: str = "runs/smollm2"):
    config = start.config_of(arg)
    config.data.update(source="tfds:state_of_the_union", batch_size=4, sequence_length=256)
    return config
