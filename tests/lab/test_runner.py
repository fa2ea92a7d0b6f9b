"""Real runs: what is missing is made, what fails is told, what diverges is a result, and done is done."""

import dataclasses
import pathlib

import pytest

from llm_jax import errors
from llm_jax import metrics
from llm_jax.lab import analysis
from llm_jax.lab import ledger
from llm_jax.lab import report
from llm_jax.lab import results
from llm_jax.lab import runner
from llm_jax.lab import sweep
from tests import commands
from tests.lab import sweeps

ROOT = pathlib.Path(__file__).parents[2]


def _executor(folder):
    return runner.Local(ROOT, "tests/lab/sweeps.py", folder / "runs")


def test_cores_are_shared_out():
    import os

    cores = sorted(os.sched_getaffinity(0))
    found = runner.cores_of(1)
    assert found == [tuple(cores)]
    many = runner.cores_of(len(cores))
    assert [core for share in many for core in share] == cores
    assert runner.cores_of(len(cores) + 1) == [()] * (len(cores) + 1)


def test_slices_are_launched_by_name():
    own = runner.Slices(
        ROOT, "experiments/x/sweep.py", ROOT, arguments="--project=p --zone=z", bucket="gs://b/f"
    )
    run = sweep.Run("gelu", (("optim.learning_rate", 1e-3),), 2)
    assert own.workdir(run) == "gs://b/f/gelu_optim.learning_rate=0.001_seed=2"


@pytest.mark.long
def test_a_suite_is_run_reported_and_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    own, said = sweeps.SWEEP, []
    found = results.Results(tmp_path, own)
    how = {"num_workers": 2, "say": said.append}
    executor = _executor(tmp_path)
    assert runner.run_missing(own, found, own.runs(), executor, **how) == []
    assert len(said) == 1 + 6 and "6 runs, 0 done" in said[0] and "minutes left" in said[-1]
    assert not list((tmp_path / "runs").iterdir())  # what is kept is in the results
    said.clear()
    assert (
        runner.run_missing(own, results.Results(tmp_path, own), own.runs(), executor, **how) == []
    )
    assert said == ["tiny: 6 runs, 6 done"]
    table = report.write(tmp_path, own)
    # The claim's sign: a learning rate of nearly nothing learns less, on both lengths.
    (finding,) = table.findings()
    assert finding.holds and ledger.summary(table)["status"] == "reproduced"
    slow, normal = table.row("slow"), table.row("normal")
    assert slow.comparison.verdict == "worse"
    lengths = [row.cell.values("long") for row in (slow, normal)]
    assert all(lengths[0][seed] > lengths[1][seed] for seed in range(3))
    # Seeds share their first loss: initialisation and order are the seed's, not the variant's.
    firsts = [row.cell.by_seed[1]["curves"]["train/loss"][0][1] for row in (slow, normal)]
    assert firsts[0] == pytest.approx(firsts[1], rel=1e-2)


@pytest.mark.long
def test_what_fails_is_told_and_what_diverges_is_a_result(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    own = sweeps.BROKEN
    found = results.Results(tmp_path, own)
    executor = dataclasses.replace(_executor(tmp_path), config="tests/lab/broken.py")
    (failure,) = runner.run_missing(own, found, own.runs(), executor, say=print)
    assert failure.run == "missing;seed=0" and "matches no file" in failure.said
    run = sweep.Run("wild", (), 0)
    assert found.get(run)["value"] is None and found.get(run)["diverged_at"] >= 1
    healthy = dataclasses.replace(own, variants=own.variants[:2])
    row = analysis.tabulate(healthy, found).row("wild")
    assert row.cell.diverged == [0] and row.value is None


@pytest.mark.long
def test_a_probe_goes_on_from_what_was_learned(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    own = sweeps.PROBED
    found = results.Results(tmp_path, own)
    executor = dataclasses.replace(_executor(tmp_path), config="tests/lab/probed.py", is_kept=True)
    assert not runner.run_missing(own, found, own.runs(), executor, say=print)
    trained, untrained = (found.get(run) for run in own.runs())
    # The metric is the probe's, at its end, where next to nothing was learned any more.
    assert [step for step, _ in trained["curves"][sweep.LOSS]] == [4]
    before = [
        row[sweep.LOSS]
        for row in metrics.read(executor.workdir(own.runs()[0]))
        if sweep.LOSS in row
    ]
    assert trained["value"] == pytest.approx(before[-1], abs=1e-3)
    assert trained["value"] < untrained["value"] - 0.01


def test_a_probe_without_its_files_is_told_before_anything_runs(tmp_path):
    probe = dict(sweeps.PROBED.probe) | {"data.source": f"text:{tmp_path}/none"}
    own = dataclasses.replace(sweeps.PROBED, probe=probe)
    with pytest.raises(errors.UserError, match="probed ends with a probe: .* matches no file"):
        runner.run_missing(own, results.Results(tmp_path, own), own.runs(), _executor(tmp_path))


@pytest.mark.slow
def test_the_command_names_what_there_is(tmp_path):
    (unknown,) = commands.run("experiments.run", tmp_path, [["activation"]])
    assert unknown[0] == 2 and "'activation' is no ablation" in unknown[2]
