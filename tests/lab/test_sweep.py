"""Runs are the base and their differences, budgets bind, and what is unequal is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.lab import analysis
from llm_jax.lab import ledger
from llm_jax.lab import report
from llm_jax.lab import results
from llm_jax.lab import sweep
from tests.lab import sweeps

GRID = {"optim.learning_rate": (1e-3, 1e-2), "train.z_loss": (0.0, 1e-4)}


def _sweep(**changes):
    variants = (
        sweep.Variant("plain"),
        sweep.Variant("gelu", {"model.activation": "gelu"}),
    )
    fields = {"name": "x", "variants": variants, "baseline": "plain", "evaluations": {}}
    return dataclasses.replace(sweeps.SWEEP, **fields | {"findings": None} | changes)


def test_a_run_is_the_base_and_its_differences():
    own = _sweep(grid=GRID)
    runs = own.runs()
    assert len(runs) == len({run.name for run in runs}) == 2 * 4 * 3
    run = sweep.Run("gelu", (("optim.learning_rate", 1e-2), ("train.z_loss", 1e-4)), 2)
    assert run in runs
    config = own.config(run)
    assert config.model.activation == "gelu" and config.train.seed == 2
    assert (config.optim.learning_rate, config.train.z_loss) == (1e-2, 1e-4)
    base = config_lib.from_config_dict(sweeps.base())
    assert config.model.embed_dim == base.model.embed_dim
    assert dataclasses.replace(own, seeds=1).runs(only=["gelu"]) == [
        r for r in runs if r.variant == "gelu" and not r.seed
    ]


def test_names_that_are_none_are_told():
    with pytest.raises(
        errors.UserError, match="'gelo' is no variant of x: did you mean 'gelu'|gelu"
    ):
        _sweep().runs(only=["gelo"])
    with pytest.raises(errors.UserError, match=r"no setting 'model.activations'"):
        _sweep(variants=(sweep.Variant("plain", {"model.activations": "x"}),)).get_config("plain")
    with pytest.raises(ValueError, match="baseline 'other'"):
        _sweep(baseline="other")
    with pytest.raises(ValueError, match="are tuned"):
        _sweep(tuned=("optim.learning_rate",))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"train.num_steps": 13}, "tokens"),
        ({"model.mlp_dim": 80}, "parameters"),
        ({"model.num_layers": 2}, "flops"),
    ],
)
def test_budgets_bind(changes, kind):
    own = _sweep(
        variants=(sweep.Variant("plain"), sweep.Variant("more", changes)),
        budgets=(sweep.Budget(kind, 0.01),),
    )
    with pytest.raises(errors.UserError, match=f"more has 1.* times the {kind} of plain"):
        own.check_budgets()
    exempt = dataclasses.replace(own.variants[1], is_exempt=True)
    dataclasses.replace(own, variants=(own.variants[0], exempt)).check_budgets()


def test_groups_are_compared_within(tmp_path):
    """Budgets bind, and rows stand beside, the first of a group; the baseline in its own."""
    names = (("plain", ""), ("gelu", ""), ("long_plain", "long"), ("long_gelu", "long"))
    variants = tuple(
        sweep.Variant(name, {"train.num_steps": 24} if group else {}, group=group)
        for name, group in names
    )
    own = _sweep(variants=variants, budgets=(sweep.Budget("tokens"),))
    own.check_budgets()
    assert [own.reference(name) for name, _ in names] == 2 * ["plain"] + 2 * ["long_plain"]
    table = analysis.tabulate(own, _filled(own, tmp_path, _value))
    assert [row.comparison is None for row in table.rows] == [True, False, True, False]
    uneven = dataclasses.replace(variants[3], changes={})
    with pytest.raises(
        errors.UserError, match="long_gelu has 0.500 times the tokens of long_plain"
    ):
        dataclasses.replace(own, variants=(*variants[:3], uneven)).check_budgets()


def test_variants_may_have_rates_of_their_own():
    rates = {"optim.learning_rate": (1e-3, 2e-3)}
    variants = (
        sweep.Variant("plain"),
        sweep.Variant("lion", grid={"optim.learning_rate": (1e-4,)}),
    )
    own = _sweep(variants=variants, grid=rates, tuned=tuple(rates), seeds=1)
    assert [run.point[0][1] for run in own.runs(["plain"])] == [1e-3, 2e-3]
    assert [run.point[0][1] for run in own.runs(["lion"])] == [1e-4]
    # What variants are compared at is the same for all.
    with pytest.raises(ValueError, match="lion has values of its own"):
        dataclasses.replace(own, tuned=())


def test_some_seeds_choose_and_the_others_run_with_what_they_chose(tmp_path):
    rates = {"optim.learning_rate": (1e-3, 2e-3, 4e-3)}
    own = _sweep(grid=rates, tuned=tuple(rates), seeds=4, tuning_seeds=2)
    assert len(own.runs()) == 2 * 3 * 2
    found = results.Results(tmp_path, own)
    with pytest.raises(errors.UserError, match="is missing"):
        analysis.further_runs(own, found)
    best = {"plain": 2e-3, "gelu": 4e-3}

    def value(run):
        # The seeds that do not choose would have chosen another one.
        other = 1.0 if run.seed >= 2 else 0.0
        return 3.0 + (run.point[0][1] != best[run.variant]) + other + 0.01 * run.seed

    found = _filled(own, tmp_path, value)
    further = analysis.further_runs(own, found)
    assert {(run.variant, run.point[0][1], run.seed) for run in further} == {
        (name, rate, seed) for name, rate in best.items() for seed in (2, 3)
    }
    with pytest.raises(errors.UserError, match="seed=2 is missing"):
        analysis.tabulate(own, found)
    for run in further:
        found.add(run, _result(value(run)))
    table = analysis.tabulate(own, found)
    assert [dict(row.tuned)["optim.learning_rate"] for row in table.rows] == [2e-3, 4e-3]
    assert table.num_seeds == 4 and table.rows[0].value.count == 4
    assert analysis.further_runs(dataclasses.replace(own, tuning_seeds=0), found) == []
    with pytest.raises(ValueError, match="no axis is tuned"):
        _sweep(tuning_seeds=1)


def test_a_probe_follows_a_run(tmp_path):
    own = _sweep(probe={"train.num_steps": 4, "optim.learning_rate": 1.0})
    run = own.runs()[-1]
    config, probe = own.configs(run)
    assert (config.train.num_steps, probe.train.num_steps) == (12, 4)
    assert config.model == probe.model and probe.train.seed == run.seed
    found = _filled(own, tmp_path, _value)
    assert found.get(run) is not None
    other = dataclasses.replace(own, probe=own.probe | {"train.num_steps": 5})
    assert results.Results(tmp_path, other).get(run) is None
    with pytest.raises(errors.UserError, match="'probe' of run 'plain;probe' is no setting"):
        _sweep().get_config("plain;probe")


# --- results ---------------------------------------------------------------------------------------


def _result(value, **changes):
    curve = [[4, 4.0], [8, 3.5], [12, value if value is not None else 3.5]]
    return {
        "value": value,
        "diverged_at": 9 if value is None else None,
        "curves": {sweep.LOSS: curve, "train/loss": curve},
        "evaluations": {},
        "seconds": 6.0,
    } | changes


def _filled(own, folder, value_of):
    found = results.Results(folder, own)
    for run in own.runs():
        found.add(run, _result(value_of(run)))
    return found


@pytest.fixture(autouse=True)
def _one_program(monkeypatch):
    monkeypatch.setattr(results, "program_hash", lambda config: "a program")
    monkeypatch.setattr(results, "commit", lambda: "abc")


def test_a_result_is_of_its_settings_and_its_code(tmp_path, monkeypatch):
    own = _sweep()
    _filled(own, tmp_path, lambda run: 3.0)
    run = own.runs()[0]
    again = results.Results(tmp_path, own)
    assert again.is_done(run) and again.get(run)["value"] == 3.0
    other = dataclasses.replace(own, variants=(sweep.Variant("plain", {"train.z_loss": 1e-4}),))
    assert results.Results(tmp_path, other).get(run) is None
    # Other files and the same program: done. Another program: not done, and still to be reported.
    monkeypatch.setattr(results, "code_hash", lambda: "other files")
    assert again.is_done(run)
    monkeypatch.setattr(results, "program_hash", lambda config: "another program")
    assert not again.is_done(run) and again.get(run) is not None
    (tmp_path / results.FILE).open("a").write("{broken\n")
    with pytest.raises(errors.UserError, match=f"results.jsonl:{len(own.runs()) + 1} is no result"):
        results.Results(tmp_path, own)


def test_programs_differ_where_numbers_do():
    import importlib

    real = importlib.reload(results).program_hash
    own = _sweep()
    config = own.config(own.runs()[0])
    assert real(config) == real(dataclasses.replace(config, profile=True))
    optim = dataclasses.replace(config.optim, learning_rate=1.0)
    assert real(config) != real(dataclasses.replace(config, optim=optim))


def _value(run):
    rng = np.random.default_rng([run.seed, len(run.variant)])
    return 3.0 + 0.3 * run.seed - 0.5 * (run.variant == "gelu") + 0.01 * rng.normal()


def test_rows_are_paired_with_the_baseline(tmp_path):
    own = _sweep()
    table = analysis.tabulate(own, _filled(own, tmp_path, _value))
    assert [row.variant for row in table.rows] == ["plain", "gelu"]
    row = table.row("gelu")
    assert row.comparison.verdict == "better" and table.row("plain").comparison is None
    assert row.comparison.difference.mean == pytest.approx(-0.5, abs=0.05)
    # Seeds are far apart, differences are not.
    assert row.value.high - row.value.low > 5 * (
        row.comparison.difference.high - row.comparison.difference.low
    )
    assert row.speedup > 1.0


def test_tuned_axes_take_the_best_value_of_each_variant(tmp_path):
    own = _sweep(grid=GRID, tuned=("optim.learning_rate",))

    def value(run):
        rate = dict(run.point)["optim.learning_rate"]
        wanted = {"plain": 1e-3, "gelu": 1e-2}[run.variant]
        return _value(run) + (rate != wanted)

    table = analysis.tabulate(own, _filled(own, tmp_path, value))
    assert len(table.rows) == 4  # at each z-loss
    for row in table.rows:
        wanted = {"plain": 1e-3, "gelu": 1e-2}[row.variant]
        assert dict(row.tuned) == {"optim.learning_rate": wanted}
    assert table.row("gelu", z_loss=0.0).comparison.verdict == "better"


def test_divergence_is_counted_and_in_no_mean(tmp_path):
    own = _sweep(diverged_above=10.0, seeds=4)

    def value(run):
        if run.variant == "gelu" and run.seed in (0, 1):
            return None if run.seed else 50.0  # by itself, or by the sweep's bound
        return _value(run)

    table = analysis.tabulate(own, _filled(own, tmp_path, value))
    row = table.row("gelu")
    assert sorted(row.cell.diverged) == [0, 1] and row.value.count == 2
    assert row.comparison.verdict == "too few seeds" and math.isnan(row.speedup)
    everywhere = _filled(own, tmp_path, lambda run: None if run.variant == "gelu" else 3.0)
    row = analysis.tabulate(own, everywhere).row("gelu")
    assert row.value is None and row.comparison is None
    assert report.rows(analysis.tabulate(own, everywhere), {})[2][-1] == "diverged"


@pytest.mark.parametrize("what", ["seed", "metric", "tokens"])
def test_what_is_no_fair_comparison_is_refused(what, tmp_path):
    own = _sweep(evaluations={"long": {"data.sequence_length": 32}} if what == "metric" else {})
    found = results.Results(tmp_path, own)
    for run in own.runs():
        if what == "seed" and (run.variant, run.seed) == ("gelu", 2):
            continue
        has_all = what != "metric" or run.variant == "plain"
        evaluations = {"long": 3.0} if what == "metric" and has_all else {}
        found.add(run, _result(3.0, evaluations=evaluations))
    messages = {
        "seed": "run gelu;seed=2 is missing, or of other settings than now",
        "metric": "run gelu;seed=0 has no 'long', which others have",
        "tokens": "more has 2.000 times the tokens",
    }
    if what == "tokens":
        variants = (*own.variants, sweep.Variant("more", {"data.batch_size": 8}))
        own = dataclasses.replace(own, variants=variants)
        for seed in range(3):
            found = results.Results(tmp_path, own)
            found.add(sweep.Run("more", (), seed), _result(3.0))
        found = results.Results(tmp_path, own)
    with pytest.raises(errors.UserError, match=messages[what]):
        analysis.tabulate(own, found)


def test_one_seed_is_called_nothing(tmp_path):
    own = _sweep(seeds=1)
    row = analysis.tabulate(own, _filled(own, tmp_path, _value)).row("gelu")
    assert row.comparison.verdict == "too few seeds" and math.isnan(row.comparison.p_value)


# --- reports ---------------------------------------------------------------------------------------


def test_a_report_says_what_the_table_says(tmp_path):
    def findings(table):
        row = table.row("gelu")
        return [
            analysis.Finding("gelu is better.", row.comparison.verdict == "better", "-0.5"),
            analysis.Finding("who knows.", None),
        ]

    own = _sweep(grid={"train.z_loss": (0.0, 1e-4)}, findings=findings)
    own = dataclasses.replace(own, kept=("train/loss",), full_size=sweeps.base_of)
    _filled(own, tmp_path, _value)
    table = report.write(tmp_path, own)
    text = (tmp_path / "report.md").read_text()
    assert "gelu is better. **reproduced**" in text and "who knows. **inconclusive**" in text
    assert str(table.row("gelu", z_loss=0.0).value) in text and "not compiled" in text
    for name in ("curves", "curves_loss", "over_z_loss"):
        for extension in ("png", "pdf"):
            assert (tmp_path / f"{name}.{extension}").stat().st_size > 1000
        assert f"({name}.png)" in text
    page = (tmp_path / "report.html").read_text()
    assert page.count("<tr>") == 5 and "<b>reproduced</b>" in page
    tex = (tmp_path / "table.tex").read_text()
    assert tex.count(r" \\") == 5 and r"z\_loss=0.0" in tex and "%" not in tex.replace(r"\%", "")
    # The same results make the same files.
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    report.write(tmp_path, own)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_ledger_has_a_line_for_each_ablation(tmp_path):
    for name, status in (("a", "reproduced"), ("b", "not reproduced")):
        (tmp_path / name).mkdir()
        one = {"claim": "c", "source": "s", "status": status, "effect": "e", "runs": 3}
        one |= {"minutes": 1.0, "commit": "abc"}
        (tmp_path / name / ledger.FILE).write_text(json.dumps(one))
    (tmp_path / "README.md").write_text("before\nBEGIN\nold\nEND\nafter\n")
    ledger.write(tmp_path, "BEGIN", "END")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\nBEGIN\n| id") and text.endswith("END\nafter\n")
    assert "[b](b/report.md) | c | s | not reproduced" in text and "old" not in text


@pytest.mark.parametrize(
    ("held", "status"),
    [
        ([], "inconclusive"),
        ([True, True], "reproduced"),
        ([True, False], "not reproduced"),
        ([True, None], "inconclusive"),
        ([None, False], "not reproduced"),
    ],
)
def test_a_status_is_that_of_the_weakest_finding(held, status):
    assert ledger.status_of([analysis.Finding("", holds) for holds in held]) == status


def test_a_run_that_was_stopped_is_no_result(tmp_path):
    own = _sweep()
    (tmp_path / "config.json").write_text(json.dumps({"train": {"num_steps": 12}}))
    rows = [{"step": step, sweep.LOSS: 5.0 - step, "train/loss": 1.0} for step in (4, 8)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(errors.UserError, match="stopped 4 steps before its end"):
        results.summary(own, str(tmp_path), {}, 1.0)
    diverged = json.dumps({"step": 9, results.DIVERGED: 1.0}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(text + diverged)
    assert results.summary(own, str(tmp_path), {}, 1.0)["diverged_at"] == 9
    last = json.dumps({"step": 12, sweep.LOSS: 2.5, "train/loss": 1.0}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(text + last)
    found = results.summary(own, str(tmp_path), {"long": 3.0}, 1.0)
    assert found["value"] == 2.5 and found["evaluations"] == {"long": 3.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 12, "train/loss": 1.0}) + "\n")
    with pytest.raises(errors.UserError, match="must evaluate"):
        results.summary(own, str(tmp_path), {}, 1.0)


def test_thinned_curves_keep_their_ends():
    points = [[step, 1.0] for step in range(1000)]
    kept = results.thinned(points)
    assert len(kept) == 40 and kept[0] == points[0] and kept[-1] == points[-1]
    assert results.thinned(points[:7]) == points[:7]


def test_values_of_layers_are_drawn_by_their_largest():
    curves = {"x": [[1, [1.0, 3.0]], [2, [5.0, "nan"]]]}
    cell = analysis.Cell("a", (), {0: {"curves": curves}, 1: {"curves": {"x": [[1, [5.0, 2.0]]]}}})
    assert cell.points("x") == {1: [3.0, 5.0]}
    assert cell.curve("x") == [(1, 4.0)] and cell.curve("y") == []
