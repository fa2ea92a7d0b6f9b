"""A sweep of tiny runs, which tests share."""

import pathlib

from llm_jax import config as config_lib
from llm_jax.lab import analysis
from llm_jax.lab import sweep

TEXT = pathlib.Path(__file__).parents[2] / "tests" / "data" / "streams.py"


def base():
    config = config_lib.new()
    config.model.update(
        num_layers=1, embed_dim=16, num_heads=2, vocab_size=256, max_length=64, dtype="float32"
    )
    config.data.update(source=f"text:{TEXT}", batch_size=4, sequence_length=16)
    config.optim.update(learning_rate=3e-3, warmup_steps=2)
    config.train.update(num_steps=12, eval_every=4, log_every=2)
    config.checkpoint.every = 0
    config.compilation_cache = ""
    return config


def findings(table):
    row = table.row("slow")
    return [analysis.Finding("slow is worse.", row.comparison.difference.mean > 0, "+")]


SWEEP = sweep.Sweep(
    name="tiny",
    claim="a learning rate of nearly nothing learns less",
    source="nobody",
    base=base,
    variants=(
        sweep.Variant("normal"),
        sweep.Variant("slow", {"optim.learning_rate": 1e-6}),
    ),
    baseline="normal",
    seeds=3,
    budgets=(sweep.Budget("tokens"), sweep.Budget("parameters"), sweep.Budget("flops")),
    evaluations={"long": {"data.sequence_length": 32}},
    smallest=0.01,
    findings=findings,
)
get_config = SWEEP.get_config


def base_of(variant):
    """A full size, which is never compiled here."""
    del variant
    return base()


BROKEN = sweep.Sweep(
    name="broken",
    claim="nothing",
    source="nobody",
    base=base,
    variants=(
        sweep.Variant("normal"),
        sweep.Variant("wild", {"optim.learning_rate": 1e30, "optim.clip_norm": None}),
        sweep.Variant("missing", {"data.source": "text:nowhere/*.txt"}),
    ),
    baseline="normal",
    seeds=1,
)

# Its probe goes on from what was learned, at a rate that changes next to nothing.
PROBED = sweep.Sweep(
    name="probed",
    claim="a probe tells what was learned",
    source="nobody",
    base=base,
    variants=(
        sweep.Variant("trained"),
        sweep.Variant("untrained", {"optim.learning_rate": 1e-6}),
    ),
    baseline="trained",
    seeds=1,
    probe={"optim.learning_rate": 1e-6, "train.num_steps": 4, "optim.warmup_steps": 0},
)
