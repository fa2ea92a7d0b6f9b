"""A Google Cloud that answers as a test says, and notes what it was asked."""

import json
import os
import pathlib
import sys

import pytest

from launch import shell

STAND_IN = pathlib.Path(__file__).with_name("stand_in.py")
NOT_FOUND = {"code": 1, "stderr": "ERROR: (gcloud) NOT_FOUND: it is not there\n"}
NO_FILES = {"code": 1, "stderr": "ERROR: (gcloud) The following URLs matched no objects or files\n"}


def answer(content, **more) -> dict:
    """Returns an answer in JSON."""
    return {"stdout": json.dumps(content), **more}


def resource(state: str, created: str = "first", failure: str = "") -> dict:
    """Returns what `queued-resources describe` prints."""
    about = {"state": state}
    if failure:
        about["failedData"] = {"error": {"code": 8, "message": failure}}
    return {
        "name": "projects/my-project/locations/us-west4-a/queuedResources/demo",
        "createTime": created,
        "state": about,
        "tpu": {"nodeSpec": [{"nodeId": "demo", "node": {"acceleratorType": "v5litepod-32"}}]},
    }


def nodes(*states: str) -> list[dict]:
    """Returns what `tpu-vm list` prints: our nodes, and one of somebody else."""
    prefix = "projects/my-project/locations/us-west4-a/nodes"
    names = ["demo"] if len(states) == 1 else [f"demo-{index}" for index in range(len(states))]
    own = [{"name": f"{prefix}/{name}", "state": state} for name, state in zip(names, states)]
    return [*own, {"name": f"{prefix}/demo-of-another", "state": "PREEMPTED"}]


class Cloud:
    """The stand-in, as a test sees it.

    Attributes:
      sleeps: seconds that were waited for, each time; no time passes.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.sleeps: list[float] = []
        self._rules: list = []
        self.rule("buckets describe", answer({"location": "US-WEST4"}))
        self.rule("accelerator-types describe", answer({"type": "v5litepod-32"}))

    def rule(self, pattern: str, *answers: dict) -> None:
        """Answers commands that `pattern` is part of, one after the other; the newest rule counts."""
        self._rules.insert(0, [pattern, list(answers)])
        (self.folder / "rules.json").write_text(json.dumps(self._rules))

    def states(self, *states) -> None:
        """Plays back the states of the queued resource; None: there is none."""
        answers = [
            NOT_FOUND
            if state is None
            else answer(state if isinstance(state, dict) else resource(state))
            for state in states
        ]
        self.rule("queued-resources describe", *answers)

    def calls(self) -> list[list[str]]:
        """Returns the commands so far."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """Returns of each command what it does, in short: "queued-resources create"."""
        return [_verb(call) for call in self.calls()]

    def shell(self) -> shell.Shell:
        return shell.Shell(sleep=self.sleeps.append)


def _verb(call: list[str]) -> str:
    words = [word for word in call[1:] if not word.startswith("-")]
    start = {"compute": 2, "storage": 0, "projects": 0}.get(words[0], 0)
    return " ".join(words[start : start + 2])


@pytest.fixture
def cloud(tmp_path, monkeypatch) -> Cloud:
    """`gcloud` and `xpk` on the PATH are the stand-in; nothing else of that name is in reach."""
    programs, folder = tmp_path / "programs", tmp_path / "cloud"
    programs.mkdir()
    folder.mkdir()
    for name in ("gcloud", "xpk"):
        program = programs / name
        program.write_text(f"#!{sys.executable} -IS\n{STAND_IN.read_text()}")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where archives are packed
    for name in ("CLOUDSDK_CORE_PROJECT", "CLOUDSDK_COMPUTE_ZONE"):
        monkeypatch.delenv(name, raising=False)
    return Cloud(folder)
