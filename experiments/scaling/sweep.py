"""Loss by parameters and tokens: budgets over sizes, a law that is fitted, and a larger model that it predicts."""

import matplotlib.figure
import numpy as np

from experiments import small
from llm_jax import config as config_lib
from llm_jax import flops
from llm_jax.lab import analysis
from llm_jax.lab import scaling
from llm_jax.lab import statistics
from llm_jax.lab import sweep

# Training flops, and the widths of the models that spend them.
_BUDGETS = {1e11: (32, 48, 64, 96), 4e11: (32, 48, 64, 96, 128), 1.6e12: (64, 96, 128, 192, 256)}
_HELD_OUT, _HELD_OUT_BUDGET, _HELD_OUT_WIDTH = "held_out", 6.4e12, 256
# The power of compute that the best size goes with, by the lowest and the highest of their three approaches.
_PAPER = (0.46, 0.50)


def base():
    config = small.decoder(num_layers=2)
    config.data.batch_size = 4
    config.train.eval_steps = 100
    return config


def _variant(name, budget, width):
    changes = {
        "model.embed_dim": width,
        "model.mlp_dim": 4 * width,
        "model.num_heads": width // 16,
        # The best rate falls as the width grows (Yang et al. 2022, figure 1).
        "optim.learning_rate": 0.256 / width,
    }
    config = base()
    sweep.apply(config, changes)
    run = config_lib.from_config_dict(config)
    lengths = (run.data.sequence_length, run.target_length)
    per_step = run.tokens_per_step * flops.train_flops_per_token(run.model, *lengths)
    steps = round(budget / per_step)
    schedule = {
        "train.num_steps": steps,
        "train.eval_every": -(-steps // 4),
        "optim.warmup_steps": steps // 10,
    }
    return sweep.Variant(name, changes | schedule, group=f"{budget:g} flops")


def points_of(table: analysis.Table) -> dict[int, dict[str, scaling.Point]]:
    """Returns for each seed the points of all variants, by name."""
    found: dict[int, dict[str, scaling.Point]] = {seed: {} for seed in range(table.sweep.seeds)}
    for row in table.rows:
        used, group = row.usage, table.sweep.variant(row.variant).group
        for seed, loss in row.cell.values().items():
            found[seed][row.variant] = scaling.Point(
                used["parameters"], used["tokens"], loss, float(group.partition(" ")[0])
            )
    return found


def _fitted(table):
    """Returns the points that laws are fitted to, by seed, and those that were held out."""
    by_seed = points_of(table)
    held = [points.pop(_HELD_OUT) for points in by_seed.values()]
    return {seed: list(points.values()) for seed, points in by_seed.items()}, held


def findings(table: analysis.Table) -> list[analysis.Finding]:
    """Holds exponents, and the prediction of a larger run, to Hoffmann et al. 2022."""
    by_seed, held = _fitted(table)
    points = [one for own in by_seed.values() for one in own]
    law = scaling.fit(points)
    found = [_of_minima(points, by_seed)]
    low, high = scaling.bootstrap(by_seed, lambda own: scaling.refit(own, law).size_exponent)
    text = (
        f"loss = {law.floor:.2f} + {law.a:.3g} / N^{law.alpha:.2f} + {law.b:.3g} / D^{law.beta:.2f} (nats a byte); its best"
        f" size goes with compute to the power {law.size_exponent:.2f} [{low:.2f}, {high:.2f}] (paper: {_PAPER[0]};"
        " alpha 0.34, beta 0.28)."
    )
    holds = bool(low < _PAPER[1] and high > _PAPER[0])
    found.append(analysis.Finding(text, holds, f"law C^{law.size_exponent:.2f}"))
    wanted = statistics.interval([one.loss for one in held])
    size, tokens = held[0].parameters, held[0].tokens
    predicted = law.loss(size, tokens)
    low, high = scaling.bootstrap(by_seed, lambda own: scaling.refit(own, law).loss(size, tokens))
    error = predicted / wanted.mean - 1
    text = (
        f"held out, {size:,} parameters on {tokens:,} bytes, {held[0].budget / max(_BUDGETS):.0f} times the largest budget:"
        f" the law says {predicted:.4f} [{low:.4f}, {high:.4f}], the runs {wanted} ({error:+.1%})."
    )
    return [*found, analysis.Finding(text, bool(abs(error) < 0.02), f"held out {error:+.1%}")]


def _of_minima(points, by_seed) -> analysis.Finding:
    best = scaling.minima(points)
    own = scaling.size_exponent(points)
    low, high = scaling.bootstrap(by_seed, scaling.size_exponent)
    shown = ", ".join(
        f"{budget:g} flops: {one.parameters:,.0f}{'' if one.is_inside else ' (outside of the sizes)'}"
        for budget, one in best.items()
    )
    text = (
        f"best sizes by parabolas: {shown}; they go with compute to the power {own:.2f} [{low:.2f}, {high:.2f}]"
        f" (paper: {_PAPER[1]})."
    )
    is_told = all(one.is_inside for one in best.values())
    holds = bool(low < _PAPER[1] and high > _PAPER[0]) if is_told else None
    return analysis.Finding(text, holds, f"minima C^{own:.2f}")


def pictures(table: analysis.Table) -> dict[str, tuple[matplotlib.figure.Figure, str]]:
    """Draws losses over sizes, a curve for each budget, with parabolas and the law."""
    by_seed, held = _fitted(table)
    points = [one for own in by_seed.values() for one in own]
    law, best = scaling.fit(points), scaling.minima(points)
    figure = matplotlib.figure.Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for budget in best:
        own = sorted(
            (one for one in points if one.budget == budget), key=lambda one: one.parameters
        )
        sizes, losses = ([getattr(one, name) for one in own] for name in ("parameters", "loss"))
        (dots,) = axes.plot(sizes, losses, "o", markersize=3, label=f"{budget:g} flops")
        curve = np.geomspace(min(sizes), max(sizes), 50)
        parabola = np.polyval(np.polyfit(np.log(sizes), losses, 2), np.log(curve))
        axes.plot(curve, parabola, color=dots.get_color(), linewidth=1)
        of_law = [law.loss(one.parameters, one.tokens) for one in own]
        axes.plot(sizes, of_law, "--", color=dots.get_color(), linewidth=0.8)
    axes.plot([one.parameters for one in held], [one.loss for one in held], "ks", markersize=3)
    predicted = law.loss(held[0].parameters, held[0].tokens)
    axes.plot(held[0].parameters, predicted, "k_", markersize=14, label="held out, predicted")
    axes.set_xscale("log")
    axes.set(xlabel="parameters", ylabel=table.sweep.metric)
    axes.legend(fontsize=7)
    caption = "Losses of equal compute over sizes: parabolas through them, and the fitted law (dashed); squares were held out."
    return {"isoflop": (figure, caption)}


SWEEP = sweep.Sweep(
    name="scaling",
    claim="the best size grows with the root of compute, and a law of small runs predicts a larger one",
    source="Hoffmann et al. 2022",
    base=base,
    variants=(
        *(
            _variant(f"c{budget / 1e11:.0f}_w{width}", budget, width)
            for budget, widths in _BUDGETS.items()
            for width in widths
        ),
        _variant(_HELD_OUT, _HELD_OUT_BUDGET, _HELD_OUT_WIDTH),
    ),
    baseline="c4_w64",
    budgets=(sweep.Budget("flops", 0.02),),
    smallest=0.01,
    findings=findings,
    pictures=pictures,
)
get_config = SWEEP.get_config
