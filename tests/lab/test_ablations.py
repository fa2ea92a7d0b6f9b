"""The ablations of `experiments`: fair, of configs that are ones, and with findings for any results."""

import dataclasses
import importlib
import json
import pathlib

import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax.lab import analysis
from llm_jax.lab import report
from llm_jax.lab import results
from llm_jax.lab import sweep

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/sweep.py"))


def _load(name):
    return importlib.import_module(f"experiments.{name}.sweep").SWEEP


@pytest.mark.parametrize("name", NAMES)
def test_ablations_are_fair_and_their_full_sizes_are_configs(name):
    own = _load(name)
    assert own.name == name
    own.check_budgets()
    for variant in own.variants:
        run = sweep.Run(variant.name, next(own.points(variant.name)), 0)
        for config in own.configs(run):
            config_lib.check_objective(config)
        if own.full_size:
            config_lib.from_config_dict(own.full_size(variant.name))
    for evaluation in own.evaluations:
        changed = own.get_config(f"{own.baseline};evaluation={evaluation}")
        config_lib.check_objective(config_lib.from_config_dict(changed))


@pytest.mark.parametrize("name", NAMES)
def test_readmes_say_what_would_pass_before_anything_ran(name):
    text = (FOLDER / name / "README.md").read_text()
    for part in ("**Claim", "**Scale gap**", "**Passes** if", f"python -m experiments.run {name}"):
        assert part in text, part


def _result(own, run, rng):
    """Returns what a run might have left; losses fall with what is learned from, and some runs diverge."""
    used = sweep.usage(own.config(run))
    value = 1.5 + 40 / used["parameters"] ** 0.4 + 60 / used["tokens"] ** 0.4
    value += 0.01 * rng.normal() + 0.02 * (len(run.variant) % 5)
    steps = own.config(run).train.num_steps
    curve = [
        [step, value + 1 - step / steps] for step in range(steps // 4, steps + 1, steps // 4 or 1)
    ]
    # Of layers; loads are of their experts.
    of_layers = {name: [3.0, 5.0 + rng.normal()] for name in own.kept}
    of_layers |= {name: [[0.2, 0.8], [0.5, 0.5]] for name in own.kept if name.endswith("load")}
    kept = {name: [[step, value] for step, _ in curve] for name, value in of_layers.items()}
    is_lost = run.seed == 1 and run.point and run.variant != own.baseline and rng.random() < 0.1
    return {
        "value": None if is_lost else value,
        "diverged_at": 7 if is_lost else None,
        "curves": {own.metric: curve, "train/loss": curve} | kept,
        "evaluations": {name: value + 0.1 * rng.random() for name in own.evaluations},
        "seconds": 60.0,
    }


@pytest.mark.parametrize("name", NAMES)
def test_findings_are_told_of_any_results(name, tmp_path, monkeypatch):
    """Runs take an hour: what tells of them must not fail then."""
    monkeypatch.setattr(results, "program_hash", lambda config: "a program")
    monkeypatch.setattr(results, "commit", lambda: "abc")
    monkeypatch.setattr(sweep, "num_parameters", _num_parameters)
    own, rng = _load(name), np.random.default_rng(0)
    found = results.Results(tmp_path, own)
    own = dataclasses.replace(
        own, tuning_seeds=0
    )  # what is drawn does not depend on what was chosen
    rows = [_row(own, run, rng) for run in own.runs()]
    (tmp_path / results.FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = results.Results(tmp_path, own)
    table = analysis.tabulate(own, found)
    lines = report.rows(table, {})
    assert len(lines) > len(own.variants)
    findings = table.findings()
    assert findings and all(one.text and one.holds in (True, False, None) for one in findings)
    for drawn, caption in (own.pictures(table) if own.pictures else {}).values():
        assert caption and drawn.axes


def _num_parameters(config):
    return 12 * config.num_layers * config.embed_dim**2


def _row(own, run, rng):
    settings = " ".join(map(sweep.settings_hash, own.configs(run)))
    return {"run": run.name, "settings": settings, "code": "", "program": ""} | _result(
        own, run, rng
    )
