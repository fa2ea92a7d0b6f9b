"""A real training, shipped, started, taken away, started again elsewhere, and brought to its end."""

import argparse
import json
import random
import sys
import time

import pytest

from launch import code
from launch import job as job_lib
from launch import settings
from launch import shell
from launch import watch
from llm_jax import metrics
from tests.launch import conftest

NUM_STEPS, EVERY, TAKEN_AT = 1500, 100, 100
OPTIONS = argparse.Namespace(
    spot=True,
    reserved=False,
    ssh="external",
    **dict.fromkeys(
        ("runtime_version", "service_account", "network", "subnetwork", "valid_until_duration")
    ),
)

# What Google does: the machine gets a SIGTERM and some seconds, then nothing of it is left.
TAKE_AWAY = """
cd {machine}
until [ -e {workdir}/checkpoints/{step} ]; do sleep 0.1; done
pid=$(sed 's/.*"pid": \\([0-9]*\\).*/\\1/' llm_jax_runs/demo/started.json)
kill -TERM $pid
while kill -0 $pid 2>/dev/null; do sleep 0.1; done
cp llm_jax_runs/demo/log.txt {workdir}/first_log.txt
rm -rf {machine}
"""


def _text(folder):
    folder.mkdir()
    rng = random.Random(0)
    words = "the model reads text and writes text as the data says".split()
    for index in range(4):
        (folder / f"{index}.txt").write_text(" ".join(rng.choices(words, k=400)))
    return folder


def _job(workdir, texts) -> job_lib.Job:
    settings_of_run = {
        "data.source": f"text:{texts}/*.txt",
        "data.tokenizer": "bytes",
        "data.sequence_length": 16,
        "model.num_layers": 1,
        "model.embed_dim": 16,
        "model.num_heads": 2,
        "model.num_kv_heads": 2,
        "model.mlp_dim": 32,
        "model.vocab_size": 256,
        "train.num_steps": NUM_STEPS,
        "train.eval_every": 0,
        "train.log_every": EVERY,
        "checkpoint.every": EVERY,
        "optim.warmup_steps": 2,
    }
    overrides = [f"--config.{name}={value}" for name, value in settings_of_run.items()]
    config = "configs/tiny.py"
    return job_lib.Job(
        place=job_lib.Place("demo", "my-project", "us-west4-a"),
        workdir=str(workdir),
        variables={"A_VARIABLE": "x y"},
        train_arguments=(f"--config={config}", *overrides),
        code_id=code.identity(code.ROOT, [config]),
        extra=config,
        before="touch was_here",
    )


@pytest.mark.long
def test_a_run_that_loses_its_machine_ends_on_another(cloud, tmp_path, monkeypatch):
    workdir, machine = tmp_path / "workdir", cloud.folder / "machine"
    monkeypatch.setenv("LAUNCH_PYTHON", sys.executable)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (cloud.folder / "has_files").touch()
    active = conftest.answer(conftest.resource("ACTIVE"))
    take_away = TAKE_AWAY.format(machine=machine, workdir=workdir, step=TAKEN_AT)
    taken = conftest.answer(conftest.resource("SUSPENDED"), after=take_away)
    again = conftest.answer(conftest.resource("ACTIVE", created="second"))
    cloud.rule("queued-resources describe", conftest.NOT_FOUND, active, taken, again)
    cloud.rule("tpu-vm list", conftest.answer(conftest.nodes("READY")))

    sh = shell.Shell(sleep=lambda _: time.sleep(0.5))
    job = _job(workdir, _text(tmp_path / "texts"))
    create = job_lib.create_command(job.place, settings.parse_slice("v5e:2x2"), OPTIONS)
    limits = watch.Limits(poll_seconds=0.5, check_every=3, max_retries=2)
    job.ship(sh)
    status = job_lib.status_line(job.place)
    watcher = watch.Watcher(sh, job, create, NUM_STEPS, limits, status)
    assert watcher.run() == 0

    verbs = [
        verb
        for verb in cloud.verbs()
        if verb in ("queued-resources create", "queued-resources delete")
    ]
    assert verbs == [f"queued-resources {verb}" for verb in ("create", "delete", "create")]
    finished = json.loads((workdir / "launch" / "finished.json").read_text())
    assert (finished["outcome"], finished["step"]) == ("finished", NUM_STEPS)
    first, second = (
        (workdir / "first_log.txt").read_text(),
        (machine / "llm_jax_runs/demo/log.txt").read_text(),
    )
    assert "SIGTERM: saved step" in first
    assert "resumed from the checkpoint of step" in second
    losses = [row["step"] for row in metrics.read(workdir) if "train/loss" in row]
    assert losses == list(range(EVERY, NUM_STEPS + 1, EVERY))
    assert (machine / f"llm_jax_runs/demo/code-{job.code_id}" / "was_here").exists()
