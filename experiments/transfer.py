"""From a sweep of a small model to the hyper-parameters of a large one: `python -m experiments.transfer SWEEP`.

    python -m experiments.transfer mup_widths --variant=mup --config=configs/llama_1b.py

Takes the best point of a sweep's grid, by the mean over seeds, of a variant that has `model.parametrisation` mup or
completep, and prints the overrides that give a large config the same: its parametrisation, the small model as its base,
and the settings of the grid. Batch size and length of training are not transferred: where they differ, the optimum may.
A best point at the edge of the grid is refused, as a better one may lie beyond it.
"""

import json
import sys
from typing import Any

from absl import flags
import jax
import numpy as np

from experiments import run
from llm_jax import command
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.lab import analysis
from llm_jax.lab import results
from llm_jax.lab import sweep as sweep_lib


def best_cell(table: analysis.Table, variant: str) -> analysis.Cell:
    """Returns the best point of a variant, of those where no run diverged.

    Raises:
      errors.UserError: there is none, or it lies at the edge of an axis of numbers.
    """
    grid = {**table.sweep.grid, **table.sweep.variant(variant).grid}
    found = [
        cell for (name, _), cell in table.cells.items() if name == variant and not cell.diverged
    ]
    if not found:
        raise errors.UserError(f"{table.sweep.name}: runs of {variant} diverged at each point")
    sign = 1.0 if table.sweep.is_less_better else -1.0
    best = min(found, key=lambda cell: sign * np.mean(list(cell.values().values())))
    for path, value in best.point:
        values = sorted(grid[path])
        if len(values) > 1 and value in (values[0], values[-1]):
            raise errors.UserError(
                f"{table.sweep.name}: {variant} is best at {path} = {value}, the edge of"
                f" {', '.join(map(str, values))}: widen the grid, and run it again"
            )
    return best


def overrides(
    small: config_lib.RunConfig, point: sweep_lib.Point, large: config_lib.RunConfig
) -> dict[str, Any]:
    """Returns what the large config is to be changed to, by path.

    Raises:
      errors.UserError: the small model's numbers do not carry over.
    """
    own = small.model
    if own.parametrisation == "standard":
        raise errors.UserError(
            "the sweep's model.parametrisation is 'standard', whose optima move with the width: sweep with"
            " 'mup', or with 'completep' for other depths"
        )
    if own.parametrisation == "mup" and own.num_layers != large.model.num_layers:
        raise errors.UserError(
            f"the sweep has {own.num_layers} layers and the large model {large.model.num_layers}: 'mup' holds"
            " over widths alone; sweep with 'completep'"
        )
    found = {
        "model.parametrisation": own.parametrisation,
        # A sweep of a model that has a base itself goes on from that.
        "model.base_width": own.base_width,
        "model.base_depth": own.base_depth,
        "model.init_stddev": own.init_stddev,
    }
    base_head = own.head_width if own.base_head_dim is None else own.base_head_dim
    if base_head != large.model.head_width:
        found["model.base_head_dim"] = base_head
    return found | dict(point)


def define_flags() -> None:
    command.define_argument("SWEEP", "Ablation whose results are taken.")
    flags.DEFINE_string("variant", None, "Of the sweep; its baseline if not given.")
    command.define_config()


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    name = command.argument("SWEEP")
    sweep, large = run.load(name), command.config_from_flags()
    table = analysis.tabulate(sweep, results.Results(run.FOLDER / name, sweep))
    variant = flags.FLAGS.variant or sweep.baseline
    cell = best_cell(table, variant)
    small = sweep.config(sweep_lib.Run(variant, cell.point, 0))
    found = overrides(small, cell.point, large)
    values = ", ".join(f"{value:.4f}" for value in cell.values().values())
    print(f"{variant} of {name}: {sweep.metric} {values}", file=sys.stderr)
    for label, key in (("rows of a batch", "batch_size"), ("tokens of a row", "sequence_length")):
        sizes = [getattr(config.data, key) for config in (small, large)]
        if sizes[0] != sizes[1]:
            print(f"not transferred: {sizes[0]} {label}, {sizes[1]} here", file=sys.stderr)
    for path, value in found.items():
        text = value if isinstance(value, str) else json.dumps(value)
        print(f"--config.{path}={text}")


if __name__ == "__main__":
    command.run(main, define_flags)
