"""Writes the comparison's `report.md` and pictures from its results: `python -m experiments.moe_routing.report`.

`--costs=all` compiles the full-size variant of each for its slice first, without a TPU, and keeps what
that found in `costs.json`.
"""

from collections.abc import Mapping
import json
import math
import pathlib
import statistics
import sys

from absl import app
from absl import flags
import matplotlib.figure
import numpy as np
from scipy import stats

from experiments.moe_routing import run as run_lib
from experiments.moe_routing import variants
from llm_jax import config as config_lib
from llm_jax.aot import kernel_cost
from llm_jax.plan import planner

HERE = pathlib.Path(__file__).parent
_SLICE = "v5e:4x4"
_CONFIDENCE = 0.95

_COSTS = flags.DEFINE_list("costs", [], "Variants whose full-size step is modelled; or: all.")


def interval(values: list[float]) -> tuple[float, float]:
    """Returns the mean, and half the width of its confidence interval (Student's t); NaN of one value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, error * float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1))


def results() -> dict[str, list[dict]]:
    """Returns the results of each variant, by seed.

    Raises:
      SystemExit: variants of other numbers of seeds, or runs of other settings than those of now, which
        are no fair comparison.
    """
    found = {name: [] for name in variants.VARIANTS}
    for name, of_name in found.items():
        for path in sorted(run_lib.RESULTS.glob(f"{name}-*.json")):
            if not run_lib.Run(name, int(path.stem.rpartition("-")[2])).is_done():
                sys.exit(f"{path} is of other settings than the variant's, run it again first")
            of_name.append(json.loads(path.read_text()))
    counts = {name: len(of_name) for name, of_name in found.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        sys.exit(f"numbers of seeds differ, run what is missing first: {counts}")
    return found


def costs(names: list[str]) -> dict[str, dict]:
    """Returns the modelled full-size steps that are kept, those of `names` made anew."""
    path = HERE / "costs.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        config = config_lib.from_config_dict(variants.full_size(name))
        (found,) = kernel_cost.costs([planner.step_case(config, _SLICE)])
        if isinstance(found, kernel_cost.Refusal):
            kept[name] = {"refusal": found.reason}
        else:
            memory = found.memory
            kept[name] = {
                "milliseconds": round(found.seconds * 1e3, 1),
                "GiB": round((memory.peak + memory.code) / 2**30, 2),
            }
        path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        print(name, kept[name], flush=True)
    return kept


def table(found: Mapping[str, list[dict]], modelled: Mapping[str, dict]) -> list[str]:
    """Returns the lines of the table, the best loss first within decoders and encoders."""
    lines = [
        "| variant | loss, nats a byte | difference to dense | MaxVio | entropy | dead | dropped | tokens/s"
        " | full-size step, ms | HBM, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group, baseline in ((variants.DECODERS, "dense"), (variants.ENCODERS, "mlm_dense")):
        losses = {name: [run["loss"] for run in found[name]] for name in group}
        for name in sorted(group, key=lambda name: statistics.mean(losses[name])):
            mean, half = interval(losses[name])
            paired = [x - y for x, y in zip(losses[name], losses[baseline], strict=True)]
            difference = "{:+.3f} ± {:.3f}".format(*interval(paired)) if name != baseline else ""
            routing = [
                _mean(found[name], f"moe/{key}")
                for key in ("max_violation", "load_entropy", "dead_experts", "drop_fraction")
            ]
            speed = statistics.median(run["tokens_per_second"] for run in found[name])
            lines.append(
                f"| `{name}` | {mean:.3f} ± {half:.3f} | {difference} | {' | '.join(routing)}"
                f" | {speed:,.0f} | {_cost(modelled, name)} |"
            )
    return lines


def _cost(modelled: Mapping[str, dict], name: str) -> str:
    """Returns the last two cells of a row."""
    if name not in modelled:
        return "not modelled |"
    cost = modelled[name]
    return "refused |" if "refusal" in cost else f"{cost['milliseconds']} | {cost['GiB']}"


def _mean(runs: list[dict], key: str) -> str:
    values = [run["routing"][key] for run in runs if key in run["routing"]]
    return f"{statistics.mean(values):.3f}" if values else ""


def heat_map(found: Mapping[str, list[dict]], path: pathlib.Path) -> None:
    """Draws the load of each expert over the steps, of the first seed's second layer."""
    names = [name for name in found if found[name][0]["load"]]
    columns = 4
    rows = math.ceil(len(names) / columns)
    figure = matplotlib.figure.Figure(figsize=(3.2 * columns, 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for place, name in zip(axes.flat, names):
        steps, loads = zip(*found[name][0]["load"])
        of_layer = np.asarray(loads)[:, 1].T
        share = of_layer / of_layer.sum(0, keepdims=True) * len(of_layer)
        extent = (steps[0], steps[-1], len(of_layer), 0)
        image = place.imshow(share, aspect="auto", vmin=0, vmax=2, cmap="viridis", extent=extent)
        place.set_title(name, fontsize=8)
        place.tick_params(labelsize=6)
    for place in axes.flat[len(names) :]:
        place.axis("off")
    figure.colorbar(image, ax=axes, label="load over an even share")
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("expert", fontsize=8)
    figure.savefig(path, dpi=90)


def findings(found: Mapping[str, list[dict]]) -> list[str]:
    """Returns what the literature says and what these runs show of it, a line each."""

    def of(name: str, key: str) -> list[float]:
        return [run["loss"] if key == "loss" else run["routing"][key] for run in found[name]]

    def verdict(name: str, other: str) -> str:
        mean, half = interval([x - y for x, y in zip(of(name, "loss"), of(other, "loss"))])
        if math.isnan(half):
            return f"{mean:+.3f} nats, of one seed: too few to say"
        shown = "shown" if abs(mean) > half else "no difference shown"
        return f"{mean:+.3f} ± {half:.3f} nats ({shown})"

    free, none, loss = (
        statistics.mean(of(name, "moe/max_violation"))
        for name in ("sigmoid_bias", "softmax_unbalanced", "softmax")
    )
    return [
        f"- Loss-free biases (Wang et al. 2024: MaxVio down several-fold at equal loss): MaxVio {free:.3f},"
        f" {none:.3f} without balancing ({none / free:.1f} times), {loss:.3f} with the balance loss; loss"
        f" against no balancing {verdict('sigmoid_bias', 'softmax_unbalanced')}, against the balance loss"
        f" {verdict('sigmoid_bias', 'softmax')}.",
        "- Experts should beat the dense model of equal operations (Shazeer et al. 2017, Fedus et al. 2021):"
        f" softmax {verdict('softmax', 'dense')}, switch {verdict('switch', 'dense')}.",
        "- A dense model with the parameters of the mixtures should be better still, at 2.8 times the operations:"
        f" against softmax {verdict('dense_params', 'softmax')}.",
        "- Learned routing should beat controls (Roller et al. 2021 found hashing close): hash against switch"
        f" {verdict('hash', 'switch')}, random against softmax {verdict('random', 'softmax')}, a frozen"
        f" router against softmax {verdict('frozen', 'softmax')}.",
        "- Expert choice should beat token choice (Zhou et al. 2022), in encoders:"
        f" {verdict('mlm_expert_choice', 'mlm_softmax')}; soft mixtures (Puigcerver et al. 2023):"
        f" {verdict('mlm_soft', 'mlm_softmax')}.",
    ]


def main(argv: list[str]) -> None:
    del argv
    names = list(variants.VARIANTS) if _COSTS.value == ["all"] else _COSTS.value
    unknown = set(names) - set(variants.VARIANTS)
    if unknown:
        sys.exit(f"--costs: {', '.join(sorted(unknown))} not among {', '.join(variants.VARIANTS)}")
    modelled = costs(names)
    found = results()
    num_seeds = len(found["dense"])
    heat_map(found, HERE / "load.png")
    tokens = variants.STEPS * config_lib.from_config_dict(variants.get_config()).tokens_per_step
    lines = [
        "# Routers, compared",
        "",
        f"Each variant trains for {variants.STEPS} steps ({tokens:,} bytes) with {num_seeds} seeds; intervals are of"
        f" {_CONFIDENCE:.0%} (Student's t) over seeds, differences paired by seed, not corrected for their"
        " number. Routing is the mean of the last quarter of a run, tokens/s the median over seeds while other runs"
        " shared the cores, so of the order alone. Operations of a token are equal within 2.5%"
        " (`variants.check_budgets`), but of `dense_params`, which has the parameters of the mixtures.",
        "",
        f"Full-size steps are those of `configs/moe_8x150m.py` with the variant's routing on {_SLICE}, modelled"
        " from the compiler's own schedule without a TPU; nobody ran them. A device has room for twice the slots"
        " that an even load sends it, and XLA's operations on rows go over all of it; `relu` may take all"
        " experts of a token, and has room for that.",
        "",
        "Written by `python -m experiments.moe_routing.run` and `python -m experiments.moe_routing.report`"
        " (`--costs=all` for the full-size steps).",
        "",
        *table(found, modelled),
        "",
        "## Against the literature",
        "",
        *findings(found),
        "",
        "## Load of experts over steps",
        "",
        "Second layer, first seed; 1 is an even share.",
        "",
        "![load of each expert over steps](load.png)",
    ]
    (HERE / "report.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
