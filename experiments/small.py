"""What ablations on two cores start from: a decoder of bytes, 0.8M parameters, on two centuries of addresses."""

from typing import Any

from llm_jax import config as config_lib

LENGTH = 128  # bytes of a row


def decoder(**changes: Any) -> Any:
    """Returns the config, with changes of its model; runs take a minute or two of a core."""
    config = config_lib.new()
    config.model.update(
        num_layers=4,
        embed_dim=128,
        num_heads=4,
        mlp_dim=512,
        vocab_size=256,
        max_length=LENGTH,
        activation="gelu_tanh",
        is_gated=False,
    )
    config.model.update(changes)
    config.data.update(batch_size=8, sequence_length=LENGTH, packing="concat")
    config.optim.update(learning_rate=2e-3, warmup_steps=40)
    config.train.update(num_steps=400, eval_every=100, eval_steps=40, log_every=20)
    config.checkpoint.every = 0
    return config


def era_probe(**changes: Any) -> dict[str, Any]:
    """Returns a probe: which half century a passage of an address is from, all weights trained for a few steps.

    Its files are `python -m experiments.tasks.data passages`'s.
    """
    folder = "~/.cache/llm_jax/tasks/passages"
    return {
        "objective.name": "sequence",
        "model.head": "sequence",
        "model.num_labels": 4,
        "data.source": f"jsonl:{folder}/train.jsonl",
        "data.eval_source": f"jsonl:{folder}/validation.jsonl",
        "data.packing": "none",
        "data.batch_size": 16,
        "optim.learning_rate": 5e-4,
        "optim.warmup_steps": 20,
        "train.num_steps": 150,
        "train.eval_every": 50,
        "train.eval_steps": 0,
    } | changes


def gpt2(**changes: Any) -> Any:
    """Returns the config of the full size that costs are compiled of: GPT-2 124M on v5e:4x4, with changes."""
    from configs import gpt2_124m

    config = gpt2_124m.get_config()
    config.model.update(changes)
    return config
