"""Streams of random documents, and stages on them."""

import dataclasses

import numpy as np

from llm_jax import config as config_lib
from llm_jax.data import objectives
from llm_jax.data import tokenizer as tokenizer_lib

EOS = 0  # of the bytes tokenizer, as its pad


@dataclasses.dataclass
class Manifest:
    source: str = "test"
    split: str = "train"


@dataclasses.dataclass
class Stream:
    """What text objectives read of a TokenCache."""

    tokens: np.ndarray
    eos_id: int = EOS
    pad_id: int = EOS
    manifest: Manifest = dataclasses.field(default_factory=Manifest)

    @property
    def num_tokens(self):
        return len(self.tokens)


def of_lengths(lengths, seed=0):
    """Returns documents of some lengths, without their eos, of printable bytes and spaces."""
    rng = np.random.default_rng(seed)
    parts = [np.append(rng.integers(32, 127, n), EOS) for n in lengths]
    return Stream(np.concatenate(parts).astype(np.uint8))


def mixed():
    """Returns some 100,000 tokens of documents of all lengths."""
    rng = np.random.default_rng(0)
    return of_lengths(rng.geometric(1 / 100, 1000).tolist())


def run_config(name, architecture, *, length=64, target_length=128, packing="packed", **objective):
    """Returns the config of an objective on bytes."""
    return config_lib.RunConfig(
        model=config_lib.ModelConfig(architecture=architecture, vocab_size=512),
        data=config_lib.DataConfig(sequence_length=length, packing=packing),
        objective=config_lib.ObjectiveConfig(name=name, target_length=target_length, **objective),
    )


def make(config, stream):
    """Returns the stage of a config on a stream, and its tokenizer."""
    config_lib.check(config)
    config_lib.check_objective(config)
    tokenizer = objectives.extended(config, tokenizer_lib.load("bytes"))
    return objectives.make(config, stream, tokenizer), tokenizer


def batch(stage, seed=0, items=None):
    """Returns all items of a stage, or some, in one batch."""
    items = np.arange(stage.num_items) if items is None else np.asarray(items)
    return stage(items, items, objectives.Draws(seed))


def share_is(count, total, share, deviations=5.0):
    """Returns whether a count is that of independent draws with some probability."""
    return abs(count - total * share) <= deviations * np.sqrt(total * share * (1 - share))
