"""What happens on a machine: real processes of worker.sh and worker.py, with a stand-in for training."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from launch import code

HERE = pathlib.Path(__file__).parent
CHECKPOINTS = """
from etils import epath

def directory(workdir):
    return epath.Path(workdir) / "checkpoints"

def steps(directory):
    return sorted(int(p.name) for p in directory.iterdir()) if directory.exists() else []
"""


class Machine:
    """A machine with unpacked code, and the workdir of a run."""

    def __init__(self, folder: pathlib.Path):
        self.code, self.workdir = folder / "code", folder / "workdir"
        self.workdir.mkdir()
        shutil.copytree(code.ROOT / "launch", self.code / "launch")
        package = self.code / "llm_jax"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "checkpoint.py").write_text(CHECKPOINTS)
        shutil.copy(HERE / "fake_train.py", package / "train.py")
        self.environment = os.environ | {"HOME": str(folder), "LAUNCH_PYTHON": sys.executable}
        self.environment.pop("PYTHONPATH", None)
        self.run_folder = folder / "llm_jax_runs" / "demo"

    def call(self, *words: str) -> subprocess.CompletedProcess:
        line = ["bash", str(self.code / "launch" / "worker.sh"), *words]
        return subprocess.run(
            line, env=self.environment, capture_output=True, text=True, timeout=60
        )

    def behave(self, how: str) -> None:
        (self.workdir / "behaviour").write_text(how)

    def start(self, *arguments: str) -> subprocess.CompletedProcess:
        return self.call("start", "demo", f"--workdir={self.workdir}", "--", *arguments)

    def status(self) -> dict:
        return json.loads(self.call("status", "demo").stdout)

    def pid(self) -> int:
        return json.loads((self.run_folder / "started.json").read_text())["pid"]

    def wait_for(self, is_reached, seconds: float = 30.0):
        deadline = time.monotonic() + seconds
        while not is_reached():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: (self.workdir / "checkpoints" / str(step)).exists())

    def wait_for_end(self) -> dict:
        self.wait_for(lambda: self.status()["state"] != "running")
        return self.status()

    def log(self) -> str:
        path = self.run_folder / "log.txt"
        return path.read_text() if path.exists() else ""

    def exits(self) -> list[dict]:
        folder = self.workdir / "launch" / "exits"
        return [json.loads(path.read_text()) for path in folder.glob("*.json")]

    def is_marked_finished(self) -> bool:
        return (self.workdir / "launch" / "finished.json").exists()


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    if (machine.run_folder / "started.json").exists() and machine.status()["state"] == "running":
        os.killpg(machine.pid(), signal.SIGKILL)


def test_a_run_outlives_its_starter_and_says_when_it_has_finished(machine):
    machine.behave("wait")
    assert machine.status()["state"] == "absent"
    done = machine.start("--config=x")
    assert done.returncode == 0, done.stderr
    assert os.getsid(machine.pid()) == machine.pid()  # a session of its own: ssh ends, it does not
    assert machine.status()["state"] == "running"
    assert not machine.is_marked_finished()
    machine.wait_for_step(4)
    machine.call("stop", "demo", "--restart")
    machine.behave("train")
    assert machine.start("--config=x").returncode == 0
    ended = machine.wait_for_end()
    assert (ended["state"], ended["outcome"], ended["step"]) == ("ended", "finished", 20)
    assert machine.is_marked_finished()
    (record,) = machine.exits()
    assert (record["outcome"], record["code"]) == ("finished", 0)
    logs = sorted((machine.workdir / "launch" / "logs").iterdir())
    assert "training from step 0" in logs[-1].read_text()


def test_starting_twice_starts_once(machine):
    machine.behave("wait")
    assert machine.start("--config=x").returncode == 0
    pid = machine.pid()
    machine.wait_for_step(2)
    again = machine.start("--config=x")
    assert again.returncode == 0
    assert "is running already" in again.stdout
    other = machine.start("--config=y")
    assert other.returncode == 2
    assert "is running something else; stop it first" in other.stderr
    assert machine.pid() == pid
    assert machine.status()["state"] == "running"
    assert machine.log().count("training from step") == 1


def test_a_stop_saves_and_the_next_start_goes_on(machine):
    machine.behave("wait")
    machine.start("--config=x")
    machine.wait_for_step(3)
    assert machine.call("stop", "demo").returncode == 0
    ended = machine.status()
    assert (ended["outcome"], ended["code"]) == ("stop_requested", 0)
    assert 3 <= ended["step"] < 20
    assert not machine.is_marked_finished()  # though the exit code is 0
    machine.behave("train")
    machine.start("--config=x")
    assert machine.wait_for_end()["outcome"] == "finished"
    assert f"training from step {ended['step']}" in machine.log()


def test_a_stop_before_a_restart_is_not_for_good(machine):
    machine.behave("wait")
    machine.start("--config=x")
    machine.wait_for_step(3)
    assert machine.call("stop", "demo", "--restart").returncode == 0
    assert machine.status()["outcome"] == "stopped"


def test_a_signal_from_outside_is_a_stop_too(machine):
    machine.behave("wait")
    machine.start("--config=x")
    machine.wait_for_step(3)
    os.kill(machine.pid(), signal.SIGTERM)  # what a machine that goes down sends
    assert machine.wait_for_end()["outcome"] == "stopped"


def test_what_does_not_end_is_ended(machine):
    machine.behave("hang")
    machine.start("--config=x")
    machine.wait_for(lambda: "training from step" in machine.log())
    assert machine.call("stop", "demo", "--seconds=1", "--restart").returncode == 0
    assert machine.status()["state"] == "dead"
    machine.start("--config=x")
    assert machine.call("stop", "demo", "--seconds=1").returncode == 0
    assert machine.status()["outcome"] == "stop_requested"


@pytest.mark.parametrize(("behaviour", "code_"), [("crash", -6), ("refuse", 2)])
def test_failures_are_told_with_their_code(machine, behaviour, code_):
    machine.behave(behaviour)
    machine.start("--config=x")
    ended = machine.wait_for_end()
    assert (ended["outcome"], ended["code"]) == ("failed", code_)
    (record,) = machine.exits()
    assert record["code"] == code_
    assert not machine.is_marked_finished()


def test_a_machine_that_lost_everything_at_once_is_dead_not_running(machine):
    machine.behave("wait")
    machine.start("--config=x")
    machine.wait_for_step(2)
    os.killpg(machine.pid(), signal.SIGKILL)
    machine.wait_for(lambda: machine.status()["state"] != "running")
    assert machine.status()["state"] == "dead"
    assert machine.exits() == []
    machine.behave("train")
    machine.start("--config=x")
    assert machine.wait_for_end()["outcome"] == "finished"


@pytest.mark.parametrize(
    ("behaviour", "is_told", "expected"),
    [("train", False, 0), ("wait", True, 143), ("crash", False, 134), ("refuse", False, 2)],
)
def test_a_container_ends_with_what_its_cluster_acts_on(machine, behaviour, is_told, expected):
    machine.behave(behaviour)
    line = ["bash", str(machine.code / "launch" / "worker.sh"), "foreground", "demo"]
    process = subprocess.Popen(
        [*line, f"--workdir={machine.workdir}", "--", "--config=x"], env=machine.environment
    )
    if is_told:
        machine.wait_for_step(2)
        process.terminate()  # the shell has given its place to worker.py
    assert process.wait(timeout=60) == expected
    assert machine.is_marked_finished() == (expected == 0)


def test_secrets_reach_the_training_and_no_log(machine, cloud):
    cloud.rule("secrets versions access", {"stdout": "hf_very_secret\n"})
    machine.environment |= {"PATH": os.environ["PATH"], "STAND_IN": os.environ["STAND_IN"]}
    machine.environment["LAUNCH_SECRETS"] = "HF_TOKEN=my-project/hf-token"
    done = machine.start("--config=x")
    machine.wait_for_end()
    (call,) = cloud.calls()
    assert call[1:] == [
        *("secrets", "versions", "access", "latest"),
        *("--secret=hf-token", "--project=my-project"),
    ]
    environment = json.loads((machine.workdir / "environment.json").read_text())
    assert environment["HF_TOKEN"] == "hf_very_secret"
    written = [path.read_text() for path in machine.run_folder.glob("*") if path.is_file()]
    written += [path.read_text() for path in (machine.workdir / "launch").rglob("*.*")]
    assert not [text for text in [done.stdout, done.stderr, *written] if "hf_very_secret" in text]


# --- setting up -----------------------------------------------------------------------------------

STUB_PYTHON = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m uv venv "*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
  *version_info*) echo 3.12 ;;
esac
"""


@pytest.mark.parametrize("has_python", [True, False])
def test_the_environment_is_made_once_from_the_lock(machine, tmp_path, has_python):
    for name in ("setup.py", "requirements-3.12.lock"):
        shutil.copy(code.ROOT / name, machine.code)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python3.12", "python3.11", "python3"):
        stub = programs / name
        is_absent = name != "python3" and not has_python
        stub.write_text("#!/bin/sh\nexit 127\n" if is_absent else STUB_PYTHON)
        stub.chmod(0o755)
    calls = tmp_path / "calls.txt"
    machine.environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls)}
    del machine.environment["LAUNCH_PYTHON"]
    assert machine.call("setup").returncode == 0
    first = calls.read_text()
    assert "pip install --quiet --progress-bar=off --editable .[tpu] --constraint" in first
    assert "--constraint requirements-3.12.lock" in first
    assert ("-m venv" in first) == has_python
    assert ("uv venv --quiet --seed --python 3.12" in first) == (not has_python)
    assert machine.call("setup").returncode == 0
    assert "install" not in calls.read_text()[len(first) :]
    with (machine.code / "requirements-3.12.lock").open("a") as lock:
        lock.write("einops==0.8.2\n")
    assert machine.call("setup").returncode == 0
    assert calls.read_text().count("--editable") == 2
