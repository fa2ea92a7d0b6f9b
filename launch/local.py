"""Runs a command as several processes of this machine, the way the hosts of a pod run it.

    python -m launch.local --num_processes=2 --devices_per_process=2 -- \\
        python -m llm_jax.train --config=configs/tiny.py --workdir=runs/tiny

Each process gets `--coordinator_address`, `--num_processes` and `--process_id`, and sees that many
CPU devices. Their lines come with the process's number in front. SIGTERM and SIGINT go to all of
them; a second one kills. When one fails, the others have `--grace` seconds to end by themselves;
then they are killed. The exit code is that of the first that failed (128 + signal if killed).
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

GRACE_SECONDS = 150.0  # longer than a process waits for signs of life (--heartbeat_timeout)
_POLL_SECONDS = 0.05
_DEVICE_COUNT = "--xla_force_host_platform_device_count"


class Group:
    """Processes that run one command together.

    Attributes:
      processes: of each, its `Popen`.
    """

    def __init__(
        self,
        command: Sequence[str],
        num_processes: int,
        devices_per_process: int,
        environment: Mapping[str, str],
        stdout: IO[str],
        stderr: IO[str],
    ):
        """Starts them; see `start`."""
        address = f"127.0.0.1:{free_port()}"
        self.processes: list[subprocess.Popen] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        for index in range(num_processes):
            place = [
                f"--coordinator_address={address}",
                f"--num_processes={num_processes}",
                f"--process_id={index}",
            ]
            process = subprocess.Popen(
                [*command, *place],
                env=_with_devices(environment, devices_per_process),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C comes to us, who pass it on
            )
            self.processes.append(process)
            self._stream(index, process.stdout, stdout)
            self._stream(index, process.stderr, stderr)

    def _stream(self, index: int, source: IO[str], target: IO[str]) -> None:
        def copy() -> None:
            for line in source:
                with self._lock:
                    target.write(f"[{index}] {line.rstrip()}\n")
                    target.flush()

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        self._threads.append(thread)

    def send(self, number: int) -> None:
        """Sends a signal to all that run."""
        for process in self.processes:
            process.send_signal(number)  # nothing, if it has ended

    def wait(self, grace: float = GRACE_SECONDS) -> int:
        """Waits for all; kills those left `grace` seconds after the first failure.

        Returns:
          0, or the exit code of the first that failed.
        """
        code, deadline = 0, None
        while None in [process.poll() for process in self.processes]:
            code = code or self._failure()
            if code and deadline is None:
                deadline = time.monotonic() + grace
            if deadline is not None and time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        for thread in self._threads:
            thread.join()
        return code or self._failure()

    def _failure(self) -> int:
        codes = [process.returncode for process in self.processes if process.returncode]
        return 0 if not codes else codes[0] if codes[0] > 0 else 128 - codes[0]


def start(
    command: Sequence[str],
    *,
    num_processes: int,
    devices_per_process: int = 1,
    environment: Mapping[str, str] | None = None,
    stdout: IO[str] | None = None,
    stderr: IO[str] | None = None,
) -> Group:
    """Starts `num_processes` of a command on CPU devices and returns at once.

    Args:
      command: program and arguments; the flags of its place are added to each.
      num_processes, devices_per_process: at least 1.
      environment: of the processes; None: this one's.
      stdout, stderr: where their lines go; None: this process's own.
    """
    return Group(
        command,
        num_processes,
        devices_per_process,
        os.environ if environment is None else environment,
        sys.stdout if stdout is None else stdout,
        sys.stderr if stderr is None else stderr,
    )


def free_port() -> int:
    """Returns a port of this machine that nothing listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _with_devices(environment: Mapping[str, str], count: int) -> dict[str, str]:
    given = re.sub(rf"{_DEVICE_COUNT}=\S+", "", environment.get("XLA_FLAGS", ""))
    return dict(environment) | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": f"{given} {_DEVICE_COUNT}={count}".strip(),
    }


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.local", description="Runs a command as several local processes."
    )
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--devices_per_process", type=int, default=1)
    parser.add_argument(
        "--grace", type=float, default=GRACE_SECONDS, help="seconds for the others to end"
    )
    parser.add_argument("command", nargs="*", help="after --: the command, as on each host")
    arguments = parser.parse_args(argv)
    if not arguments.command:
        parser.error("there is no command: -- python -m llm_jax.train --config=... --workdir=...")
    for name in ("num_processes", "devices_per_process"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}={getattr(arguments, name)} must be at least 1")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    arguments = _arguments(argv)
    group: Group | None = None
    received: list[int] = []

    def pass_on(number: int, _) -> None:
        received.append(number)
        if group is not None:
            group.send(number if len(received) == 1 else signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    group = start(
        arguments.command,
        num_processes=arguments.num_processes,
        devices_per_process=arguments.devices_per_process,
    )
    for number in received:  # while they were being started
        group.send(number)
    return group.wait(arguments.grace)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
