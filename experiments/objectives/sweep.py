"""What a decoder is to predict: what it learned by that, held to one task."""

from experiments import small
from llm_jax.lab import analysis
from llm_jax.lab import sweep

_UNTRAINED = "untrained"


def base():
    # Room for the ids that stand for spans.
    config = small.decoder(vocab_size=384)
    config.train.update(num_steps=800, eval_every=200)
    return config


def findings(table: analysis.Table) -> list[analysis.Finding]:
    """Holds objectives to what Raffel et al. 2020 found by fine-tuning decoders."""
    untrained = table.row(_UNTRAINED).comparison
    text = (
        f"without training before it the task ends {untrained.difference.mean:+.4f} from where it does after causal"
        f" training: {untrained.verdict}."
    )
    is_told = untrained.verdict.startswith("worse")
    found = [analysis.Finding(text, is_told)]
    for name in ("prefix", "span_corruption", "ul2"):
        comparison = table.row(name).comparison
        text = f"{name} against causal: {comparison.difference.mean:+.4f}, {comparison.verdict} (paper: better)."
        holds = comparison.bears_out("better")
        effect = f"{name} {comparison.difference.mean:+.3f}"
        found.append(analysis.Finding(text, holds if is_told else None, effect))
    return found


SWEEP = sweep.Sweep(
    name="objectives",
    claim="decoders that see prefixes both ways, or restore spans, learn more for a task than causal ones",
    source="Raffel et al. 2020; Tay et al. 2023",
    base=base,
    variants=(
        sweep.Variant("causal"),
        sweep.Variant(
            "prefix", {"objective.name": "prefix", "objective.is_input_bidirectional": True}
        ),
        sweep.Variant("span_corruption", {"objective.name": "span_corruption"}),
        sweep.Variant("ul2", {"objective.name": "ul2"}),
        sweep.Variant(_UNTRAINED, {"train.num_steps": 1, "optim.warmup_steps": 0}, is_exempt=True),
    ),
    baseline="causal",
    budgets=(sweep.Budget("tokens"), sweep.Budget("parameters")),
    seeds=5,
    smallest=0.01,
    probe=small.era_probe(**{"model.pooling": "last"}),
    findings=findings,
)
get_config = SWEEP.get_config
