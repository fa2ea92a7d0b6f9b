"""What relates two entities of a sentence, by WordNet's relations: MiniLM reads the sentence with both marked.

    python -m experiments.tasks.data relation_pairs
    python -m experiments.tasks.models minilm runs/minilm
    python -m llm_jax.train --config=experiments/tasks/configs/relations.py:runs/minilm --workdir=runs/relations
    python -m experiments.tasks.graph --entities=runs/entities --relations=runs/relations \
        --data=~/.cache/llm_jax/tasks/relations/test.jsonl --output=graph.jsonld

Slice: cpu. Data: pairs of entities of the sentences of `relations`, of which 24,000 are read.
Expected: see `experiments/tasks/README.md`.
"""

from llm_jax import start

FOLDER = "~/.cache/llm_jax/tasks/relation_pairs"


def get_config(arg: str = "runs/minilm"):
    config = start.config_of(arg)
    config.model.update(head="sequence", num_labels=16, pooling="mean", use_pooler=False)
    config.objective.name = "sequence"
    config.data.update(source=f"jsonl:{FOLDER}/train.jsonl", batch_size=48, sequence_length=64)
    config.data.eval_source = f"jsonl:{FOLDER}/validation.jsonl"
    config.tune.layer_decay = 0.85
    config.optim.update(learning_rate=4e-4, schedule="linear", warmup_steps=40, weight_decay=0.01)
    config.optim.update(b2=0.999, final_lr_fraction=0.0)
    config.train.update(num_steps=500, eval_every=250, eval_steps=40)
    config.checkpoint.every = 250
    return config
