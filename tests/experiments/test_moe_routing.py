"""The comparison of routers: equal budgets, honest statistics, and refusals of unequal runs."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import stats

from experiments.moe_routing import report
from experiments.moe_routing import run
from experiments.moe_routing import variants
from llm_jax import config as config_lib


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_variants_are_runs_at_both_sizes(name):
    small = config_lib.from_config_dict(variants.get_config(name))
    large = config_lib.from_config_dict(variants.full_size(name))
    assert small.model.moe.router == large.model.moe.router
    assert small.model.moe.is_on == large.model.moe.is_on == (large.mesh.expert > 1)
    assert large.model.architecture == small.model.architecture


def test_operations_are_equal_but_of_the_larger_dense_model():
    found = variants.check_budgets()
    assert found["dense_params"] > 2 * found["dense"]


def test_unequal_operations_are_refused(monkeypatch):
    monkeypatch.setitem(variants.VARIANTS, "wide", {"mlp_dim": 1024})
    with pytest.raises(ValueError, match="wide costs 1.6"):
        variants.check_budgets()


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="'sofmax' is none of dense, "):
        variants.get_config("sofmax")


def test_intervals_are_those_of_scipy():
    values = list(np.random.default_rng(0).normal(size=5))
    mean, half = report.interval(values)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    np.testing.assert_allclose((mean - half, mean + half), (low, high))
    assert math.isnan(report.interval([1.0])[1])


def _rows(loss, load):
    rows = [
        {"step": step, "train/loss": 9.0 - step, "perf/tokens_per_second": 100.0 + step}
        | {"moe/max_violation": float(step), "moe/layers/load": load}
        for step in range(1, 9)
    ]
    return [*rows, {"step": 8, "eval/validation/loss": loss}]


def test_a_summary_is_of_the_last_quarter():
    found = run.summary(_rows(2.5, [[0.5, 0.5]] * 4))
    assert found["loss"] == 2.5 and found["tokens_per_second"] == 105.0
    assert found["routing"] == {"moe/max_violation": 7.5}
    assert len(found["load"]) == 8


def test_other_settings_are_other_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    first = run.Run("softmax", 0)
    assert not first.is_done()
    first.path.write_text(json.dumps({"settings": first.fingerprint()}))
    assert first.is_done()
    assert dataclasses.replace(first, seed=1).fingerprint() != first.fingerprint()
    monkeypatch.setattr(variants, "STEPS", 50)
    assert not first.is_done()


def _written(folder, name, seed, loss):
    folder.mkdir(exist_ok=True)
    rows = _rows(loss, [[0.25, 0.75]] * 4)
    kept = {"settings": run.Run(name, seed).fingerprint()} | run.summary(rows)
    (folder / f"{name}-{seed}.json").write_text(json.dumps(kept))


def test_a_report_orders_by_loss_and_says_what_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    for index, name in enumerate(variants.VARIANTS):
        for seed in range(3):
            _written(tmp_path / "results", name, seed, 2.0 + index / 10 + seed / 1000)
    found = report.results()
    lines = report.table(found, {"dense": {"milliseconds": 12.5, "GiB": 1.5}})
    assert len(lines) == 2 + len(variants.VARIANTS)
    assert lines[2].startswith("| `dense` | 2.001 ± 0.002 |  |") and "| 12.5 | 1.5 |" in lines[2]
    assert "| +0.100 ± 0.000 |" in lines[3] and "not modelled" in lines[3]
    assert any("softmax +0.200 ± 0.000 nats (shown)" in line for line in report.findings(found))
    report.heat_map(found, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")

    _written(tmp_path / "results", "softmax", 3, 2.0)
    with pytest.raises(SystemExit, match="numbers of seeds differ"):
        report.results()
    (tmp_path / "results" / "softmax-3.json").write_text('{"settings": "older"}')
    with pytest.raises(SystemExit, match="softmax-3.json is of other settings"):
        report.results()
