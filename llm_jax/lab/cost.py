"""The full-size variant of each row, compiled for its slice without a TPU, and kept in `costs.json`.

A cost is of the config and of the compiler: where either has changed it is compiled again when it is asked for.
"""

from collections.abc import Callable
from collections.abc import Sequence
import json
import os
import pathlib
from typing import Any

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.aot import kernel_cost
from llm_jax.lab import sweep as sweep_lib
from llm_jax.plan import planner

FILE = "costs.json"


def read(folder: pathlib.Path, sweep: sweep_lib.Sweep) -> dict[str, dict[str, Any]]:
    """Returns the costs that are kept, by variant; of variants whose full size is not what it was there are none."""
    path = folder / FILE
    kept = json.loads(path.read_text()) if path.exists() else {}
    if sweep.full_size is None:
        return {}
    return {
        variant.name: kept[variant.name]
        for variant in sweep.variants
        if variant.name in kept and kept[variant.name]["settings"] == _settings(sweep, variant.name)
    }


def _settings(sweep: sweep_lib.Sweep, name: str) -> str:
    config = config_lib.from_config_dict(sweep.full_size(name))
    return f"{sweep_lib.settings_hash(config)} {sweep.slice}"


def compile_missing(
    folder: pathlib.Path,
    sweep: sweep_lib.Sweep,
    names: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Compiles what is missing, or all of `names` again; returns all costs, by variant.

    Raises:
      errors.UserError: the sweep has no full size, or no such variant.
    """
    if sweep.full_size is None:
        raise errors.UserError(f"{sweep.name} names no full size: there is nothing to compile")
    for name in names:
        sweep.variant(name)
    kept = read(folder, sweep)
    for variant in sweep.variants:
        if variant.name in kept and variant.name not in names:
            continue
        config = config_lib.from_config_dict(sweep.full_size(variant.name))
        (found,) = kernel_cost.costs([planner.step_case(config, sweep.slice)])
        kept[variant.name] = {"settings": _settings(sweep, variant.name)} | _summary(found)
        partial = (folder / FILE).with_suffix(".tmp")
        partial.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        os.replace(partial, folder / FILE)
        say(f"{sweep.name}: {variant.name} on {sweep.slice}: {describe(kept[variant.name])}")
    return kept


def _summary(found: kernel_cost.ProgramCost | kernel_cost.Refusal) -> dict[str, Any]:
    if isinstance(found, kernel_cost.Refusal):
        return {"refusal": found.reason}
    links = sum(collective.seconds for collective in found.collectives)
    return {
        "milliseconds": round(found.seconds * 1e3, 1),
        "GiB": round((found.memory.peak + found.memory.code) / 2**30, 2),
        "collective_ms": round(links * 1e3, 1),
        "exposed_ms": round(found.exposed_seconds * 1e3, 1),
        "is_exact": found.is_exact,
    }


def describe(cost: dict[str, Any] | None) -> str:
    """Returns a cost as a cell of a table."""
    if cost is None:
        return "not compiled"
    if "refusal" in cost:
        return f"refused: {cost['refusal']}"
    text = f"{cost['milliseconds']:,} ms, {cost['GiB']} GiB"
    if "collective_ms" not in cost:  # compiled before they were kept
        return text
    return f"{text}, collectives {cost['collective_ms']:,} ms ({cost['exposed_ms']:,} exposed)"
