"""On each machine of a slice: starts the training detached, watches over it and writes how it ended.

    python -m launch.worker start NAME --workdir=gs://... -- --config=... [--config.x=y ...]
    python -m launch.worker status NAME         one line of JSON: running, ended or absent
    python -m launch.worker stop NAME           SIGTERM: the training saves and ends
    python -m launch.worker foreground NAME ... the same without detaching, for containers

Two files in the workdir speak of the end, so that it is known when the machine is gone: each machine
writes launch/exits/HOST.json, and whoever sees the last step saved writes launch/finished.json. An exit
code of 0 is not enough for that: a training that is told to stop saves and ends with 0 as well.
"""

import argparse
from collections.abc import Sequence
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

from etils import epath

HOME_VARIABLE = "LLM_JAX_HOME"
SECRETS_VARIABLE = "LAUNCH_SECRETS"  # "NAME=project/secret,...": names alone, never values
_RESTARTED_AFTER_STOP = 128 + signal.SIGTERM  # a container that ends so is started again
_SECONDS_TO_DIE = 30.0  # after SIGKILL; a device may hold a process for a while


def folder(name: str) -> pathlib.Path:
    """Returns the folder of a run on this machine."""
    home = os.environ.get(HOME_VARIABLE, "~/llm_jax_runs")
    return pathlib.Path(home).expanduser() / name


def progress(workdir: str) -> tuple[int | None, int | None]:
    """Returns the newest step that is saved whole and the step that the run ends at.

    None for either that the workdir does not have yet.
    """
    # JAX comes with it: `start` and `status` need not wait for that.
    from llm_jax import checkpoint

    steps = checkpoint.steps(checkpoint.directory(workdir))
    config = epath.Path(workdir) / "config.json"
    num_steps = json.loads(config.read_text())["train"]["num_steps"] if config.exists() else None
    return (steps[-1] if steps else None), num_steps


class Supervisor:
    """One training process, from its start to the record of its end."""

    def __init__(self, name: str, workdir: str, arguments: Sequence[str]):
        self._folder, self._workdir = folder(name), workdir
        self._command = [sys.executable, "-m", "llm_jax.train", f"--workdir={workdir}", *arguments]
        self._process: subprocess.Popen | None = None
        self._is_told_to_stop = False

    def run(self) -> dict:
        """Trains to the end; returns what was recorded of it."""
        signal.signal(signal.SIGTERM, self._pass_on)
        environment = os.environ | secrets(os.environ.get(SECRETS_VARIABLE, ""))
        log = self._folder / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{_now()} {socket.gethostname()}: {' '.join(self._command)}", flush=True)
        self._process = subprocess.Popen(self._command, env=environment)
        if self._is_told_to_stop:  # between the handler and the start
            self._process.terminate()
        _import_for_the_end(self._workdir)
        code = self._process.wait()
        record = {"host": socket.gethostname(), "code": code, "time": _now()}
        try:
            record |= self._outcome(code)
        except Exception as error:
            record |= {"outcome": "failed", "error": f"reading the workdir: {error}"}
            raise
        finally:
            self._write(record)
        return record

    def _pass_on(self, number: int, frame: types.FrameType | None) -> None:
        del number, frame
        self._is_told_to_stop = True
        if self._process is not None:
            self._process.terminate()

    def _outcome(self, code: int) -> dict:
        step, num_steps = progress(self._workdir)
        outcome = "failed"
        if code == 0:
            is_finished = step is not None and num_steps is not None and step >= num_steps
            outcome = "finished" if is_finished else "stopped"
        elif self._is_told_to_stop:
            outcome = "stopped"
        if outcome == "stopped" and (self._folder / "stop_requested").exists():
            outcome = "stop_requested"
        return {"outcome": outcome, "step": step, "num_steps": num_steps}

    def _write(self, record: dict) -> None:
        text = json.dumps(record)
        print(f"{_now()} ended: {text}", flush=True)
        (self._folder / "exit.json").write_text(text)
        launch = epath.Path(self._workdir) / "launch"
        host = record["host"]
        log = self._folder / "log.txt"
        if log.exists():
            (launch / "logs").mkdir(parents=True, exist_ok=True)
            stamp = record["time"].replace(":", "")
            (launch / "logs" / f"{host}-{stamp}.txt").write_text(log.read_text(errors="replace"))
        (launch / "exits").mkdir(parents=True, exist_ok=True)
        (launch / "exits" / f"{host}.json").write_text(text + "\n")
        if record["outcome"] == "finished":  # last: whoever sees it may take the machine away
            (launch / "finished.json").write_text(text + "\n")


def _import_for_the_end(workdir: str) -> None:
    """Imports what recording the end needs: a machine that is about to be taken away has seconds."""
    from llm_jax import checkpoint

    del checkpoint
    if workdir.startswith("gs://"):
        import tensorflow  # by which epath speaks to buckets

        del tensorflow


def secrets(listed: str) -> dict[str, str]:
    """Returns environment variables from Secret Manager; their values are never printed.

    Args:
      listed: "WANDB_API_KEY=my-project/wandb-key,...".

    Raises:
      RuntimeError: one of them cannot be read; names it.
    """
    values = {}
    for item in filter(None, listed.split(",")):
        variable, _, place = item.partition("=")
        project, _, secret = place.partition("/")
        command = ["gcloud", "secrets", "versions", "access", "latest"]
        command += [f"--secret={secret}", f"--project={project}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"secret {place} for {variable}: {done.stderr.strip()}")
        values[variable] = done.stdout.rstrip("\n")
    return values


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _locked(run: pathlib.Path):
    """Returns the open lock of a run, or None if its supervisor, who inherits it, is alive."""
    run.mkdir(parents=True, exist_ok=True)
    lock = (run / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def start(name: str, workdir: str, arguments: Sequence[str]) -> int:
    """Starts a run that outlives this process, unless it runs already; returns an exit code."""
    run = folder(name)
    asked = {"workdir": workdir, "arguments": list(arguments), "code": str(pathlib.Path.cwd())}
    lock = _locked(run)
    if lock is None:
        running = json.loads((run / "started.json").read_text())
        if {key: running[key] for key in asked} == asked:
            print(f"{socket.gethostname()}: {name} is running already (pid {running['pid']})")
            return 0
        print(
            f"error: {socket.gethostname()}: {name} is running something else; stop it first:"
            f" {json.dumps(running)}",
            file=sys.stderr,
        )
        return 2
    for stale in ("exit.json", "stop_requested"):
        (run / stale).unlink(missing_ok=True)
    command = [sys.executable, "-m", "launch.worker", "foreground", name, f"--workdir={workdir}"]
    with (run / "log.txt").open("a") as log:
        process = subprocess.Popen(
            [*command, "--", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # the end of the ssh session does not reach it
            pass_fds=(lock.fileno(),),
        )
    (run / "started.json").write_text(json.dumps(asked | {"pid": process.pid}))
    print(f"{socket.gethostname()}: started {name} (pid {process.pid}), log: {run / 'log.txt'}")
    return 0


def status(name: str) -> dict:
    """Returns what is known of a run on this machine."""
    run = folder(name)
    state = {"host": socket.gethostname()}
    if not (run / "started.json").exists():
        return state | {"state": "absent"}
    lock = _locked(run)
    if lock is None:
        return state | {"state": "running"}
    lock.close()
    if (run / "exit.json").exists():
        return state | {"state": "ended"} | json.loads((run / "exit.json").read_text())
    # Killed before it could say anything: by a stop that it did not heed, or with its machine.
    if (run / "stop_requested").exists():
        return state | {"state": "ended", "outcome": "stop_requested", "code": -signal.SIGKILL}
    return state | {"state": "dead"}


def stop(name: str, seconds: float, is_final: bool) -> int:
    """Ends a run with time to save, by force after `seconds`; returns an exit code.

    Args:
      is_final: whether whoever watches the run is to leave it so.
    """
    run = folder(name)
    deadline = time.monotonic() + seconds
    while (lock := _locked(run)) is None:
        pid = json.loads((run / "started.json").read_text())["pid"]
        if is_final:
            (run / "stop_requested").touch()
        if time.monotonic() > deadline + _SECONDS_TO_DIE:
            print(
                f"error: {socket.gethostname()}: {name} (pid {pid}) does not end", file=sys.stderr
            )
            return 1
        is_late = time.monotonic() > deadline
        with contextlib.suppress(ProcessLookupError):  # it ended a moment ago: the lock will tell
            if is_late:
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGTERM)
        time.sleep(1.0)
    lock.close()
    print(f"{socket.gethostname()}: {name} does not run")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.worker", allow_abbrev=False)
    parser.add_argument("verb", choices=("start", "status", "stop", "foreground"))
    parser.add_argument("name")
    parser.add_argument("--workdir")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="that a stop leaves for saving"
    )
    parser.add_argument("--restart", action="store_true", help="the stop is to start again")
    argv = list(sys.argv[1:] if argv is None else argv)
    divider = argv.index("--") if "--" in argv else len(argv)
    arguments, passed_on = parser.parse_args(argv[:divider]), argv[divider + 1 :]
    if arguments.verb in ("start", "foreground") and not arguments.workdir:
        parser.error("--workdir is missing")
    if arguments.verb == "start":
        return start(arguments.name, arguments.workdir, passed_on)
    if arguments.verb == "status":
        print(json.dumps(status(arguments.name)))
        return 0
    if arguments.verb == "stop":
        return stop(arguments.name, arguments.seconds, is_final=not arguments.restart)
    record = Supervisor(arguments.name, arguments.workdir, passed_on).run()
    if record["outcome"] == "stopped":
        return _RESTARTED_AFTER_STOP
    return record["code"] if record["code"] >= 0 else 128 - record["code"]


if __name__ == "__main__":
    sys.exit(main())
