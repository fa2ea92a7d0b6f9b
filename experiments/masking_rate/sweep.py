"""How many tokens an encoder is to predict: what it learned by that, held to one task."""

from experiments import small
from llm_jax.lab import analysis
from llm_jax.lab import sweep

_RATES = (0.15, 0.3, 0.4, 0.6, 0.8)
_UNTRAINED = "untrained"


def base():
    # Room for the id of the mask.
    config = small.decoder(architecture="encoder", vocab_size=384, positions="learned")
    config.objective.name = "mlm"
    config.train.update(num_steps=800, eval_every=200)
    return config


def _name(rate):
    return f"masked_{100 * rate:.0f}"


def findings(table: analysis.Table) -> list[analysis.Finding]:
    """Holds rates above 15% to Wettig et al. 2023, and asks whether anything was learned that the task needs."""
    untrained = table.row(_UNTRAINED).comparison
    text = (
        f"without training before it the task ends {untrained.difference.mean:+.4f} from where it does after 15%:"
        f" {untrained.verdict}."
    )
    is_told = untrained.verdict.startswith("worse")
    found = [analysis.Finding(text, is_told)]
    means = {rate: table.row(_name(rate)).value.mean for rate in _RATES}
    best = min(means, key=means.get)
    shown = ", ".join(f"{rate:.0%} {mean:.4f}" for rate, mean in means.items())
    forty = table.row(_name(0.4)).comparison
    text = (
        f"loss of the task by rate: {shown}; the best is {best:.0%}. 40% against 15%: {forty.difference.mean:+.4f},"
        f" {forty.verdict} (paper: no worse, and better in large models)."
    )
    holds = forty.bears_out("no worse") if is_told else None
    found.append(analysis.Finding(text, holds, f"40% {forty.difference.mean:+.3f}"))
    most = table.row(_name(0.8)).comparison
    text = f"80% against 15%: {most.difference.mean:+.4f}, {most.verdict} (paper: worse, and far better than nothing)."
    is_between = means[0.8] < table.row(_UNTRAINED).value.mean
    holds = bool(most.difference.mean > 0 and is_between) if is_told else None
    found.append(analysis.Finding(text, holds, f"80% {most.difference.mean:+.3f}"))
    return found


SWEEP = sweep.Sweep(
    name="masking_rate",
    claim="an encoder may be asked for more than 15% of its tokens",
    source="Wettig et al. 2023",
    base=base,
    variants=(
        *(sweep.Variant(_name(rate), {"objective.mask_rate": rate}) for rate in _RATES),
        sweep.Variant(_UNTRAINED, {"train.num_steps": 1, "optim.warmup_steps": 0}, is_exempt=True),
    ),
    baseline=_name(0.15),
    budgets=(sweep.Budget("tokens"), sweep.Budget("parameters")),
    seeds=5,
    smallest=0.01,
    probe=small.era_probe(**{"model.pooling": "mean"}),
    findings=findings,
)
get_config = SWEEP.get_config
