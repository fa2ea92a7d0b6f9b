"""Where norms stand, over learning rates and with and without warmup: what diverges, and what is best."""

from experiments import small
from llm_jax.lab import analysis
from llm_jax.lab import sweep

_RATES = (1e-3, 4e-3, 1.6e-2)
_WARMUPS = (0, 100)


def base():
    config = small.decoder(num_layers=8)
    config.train.update(num_steps=300, eval_every=100, eval_steps=40)
    config.optim.clip_norm = None  # which hides what warmup is for
    return config


def full_size(name):
    """Returns GPT-2 124M with a variant's norms."""
    return small.gpt2(norm_placement=SWEEP.variant(name).changes["model.norm_placement"])


def findings(table: analysis.Table) -> list[analysis.Finding]:
    """Holds post-norm's need of warmup, and pre-norm's lack of it, to Xiong et al. 2020."""
    found = []
    losses = {}
    for name in ("pre", "post"):
        for warmup in _WARMUPS:
            cells = [table.cell(name, learning_rate=rate, warmup_steps=warmup) for rate in _RATES]
            # A run that diverged counts as bytes without a model.
            losses[name, warmup] = [
                analysis.mean_of([*cell.values().values(), *[5.55] * len(cell.diverged)])
                for cell in cells
            ]
    best = {key: min(values) for key, values in losses.items()}
    gain = {name: best[name, 0] - best[name, _WARMUPS[-1]] for name in ("pre", "post")}
    text = (
        f"warmup lowers post-norm's best loss by {gain['post']:.3f}, pre-norm's by {gain['pre']:.3f} (paper: post-norm"
        " needs it, pre-norm does not)."
    )
    holds = bool(gain["post"] > 0.05 and gain["pre"] < gain["post"] / 2)
    found.append(
        analysis.Finding(text, holds, f"warmup: post {gain['post']:.2f}, pre {gain['pre']:.2f}")
    )
    spread = {name: max(losses[name, 0]) - min(losses[name, 0]) for name in ("pre", "post")}
    text = (
        f"without warmup the loss spreads by {spread['post']:.3f} over learning rates with post-norm, by"
        f" {spread['pre']:.3f} with pre-norm."
    )
    found.append(analysis.Finding(text, bool(spread["post"] > spread["pre"])))
    return found


SWEEP = sweep.Sweep(
    name="norm_placement",
    claim="post-norm needs warmup and low rates, pre-norm does not",
    source="Xiong et al. 2020",
    base=base,
    variants=tuple(
        sweep.Variant(name, {"model.norm_placement": name})
        for name in ("pre", "post", "sandwich", "output")
    ),
    baseline="pre",
    grid={"optim.learning_rate": _RATES, "optim.warmup_steps": _WARMUPS},
    tuned=("optim.learning_rate",),
    budgets=(
        sweep.Budget("tokens"),
        sweep.Budget("flops", 0.001),
        sweep.Budget("parameters", 0.005),
    ),
    smallest=0.02,
    diverged_above=4.0,
    full_size=full_size,
    findings=findings,
)
get_config = SWEEP.get_config
