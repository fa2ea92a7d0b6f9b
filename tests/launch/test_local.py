"""Local processes: their place, their lines, their signals, and how they end."""

import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch import local

ROOT = pathlib.Path(__file__).parents[2]
SHOW = """
import os, sys
print(sys.argv[1:], os.environ["XLA_FLAGS"], os.environ["JAX_PLATFORMS"])
print("a word", file=sys.stderr)
"""
# Process 1 ends with 3; the others never would.
ONE_FAILS = """
import sys, time
if sys.argv[-1] == "--process_id=1":
    sys.exit(3)
time.sleep(100)
"""
# Every process ends by the signal it gets, with a code that tells which.
WAITS = """
import signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: sys.exit(40 + number))
print("ready", flush=True)
time.sleep(100)
"""
STUBBORN = WAITS.replace("sys.exit(40 + number)", "print('no', flush=True)")


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _start(code: str, num_processes: int = 2, **options) -> tuple[local.Group, io.StringIO]:
    out = io.StringIO()
    group = local.start(
        _python(code), num_processes=num_processes, stdout=out, stderr=out, **options
    )
    return group, out


def test_each_process_gets_its_place_and_its_devices():
    environment = {**os.environ, "XLA_FLAGS": f"--a=1 {local._DEVICE_COUNT}=8 --b=2"}
    out, err = io.StringIO(), io.StringIO()
    group = local.start(
        _python(SHOW),
        num_processes=3,
        devices_per_process=4,
        environment=environment,
        stdout=out,
        stderr=err,
    )
    assert group.wait() == 0
    lines = sorted(out.getvalue().splitlines())
    ports = set()
    for index, line in enumerate(lines):
        place = line.removeprefix(f"[{index}] ")
        arguments, _, rest = place.partition("] ")
        assert f"'--num_processes=3', '--process_id={index}'" in arguments
        ports.add(arguments.partition(",")[0])
        assert rest.split() == ["--a=1", "--b=2", f"{local._DEVICE_COUNT}=4", "cpu"]
    assert len(lines) == 3 and len(ports) == 1 and "127.0.0.1:" in ports.pop()
    assert sorted(err.getvalue().splitlines()) == [f"[{index}] a word" for index in range(3)]


def test_the_first_failure_ends_the_others_in_time_and_gives_the_code():
    started = time.monotonic()
    group, _ = _start(ONE_FAILS, 3)
    assert group.wait(grace=0.5) == 3
    assert time.monotonic() - started < 20
    assert [process.returncode for process in group.processes] == [-9, 3, -9]


def test_a_killed_process_is_a_failure():
    group, out = _start(WAITS)
    while out.getvalue().count("ready") < 2:
        time.sleep(0.01)
    group.processes[1].kill()
    assert group.wait(grace=0.1) == 128 + signal.SIGKILL


def _launcher(code: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.local", "--num_processes=2", "--", *_python(code)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(number):
    process = _launcher(WAITS)
    process.send_signal(number)
    assert process.wait(timeout=20) == 40 + number


def test_a_second_signal_kills():
    process = _launcher(STUBBORN)
    process.send_signal(signal.SIGTERM)
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] no\n", "[1] no\n"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    "argv, part",
    [
        ([], "there is no command"),
        (["--num_processes=0", "--", "true"], "--num_processes=0 must be at least 1"),
        (["--devices_per_process=0", "--", "true"], "--devices_per_process=0 must be"),
        (["--num_proceses=2", "--", "true"], "--num_proceses=2"),
    ],
)
def test_wrong_arguments_are_refused(argv, part, capsys):
    with pytest.raises(SystemExit) as caught:
        local.main(argv)
    assert caught.value.code == 2
    assert part in capsys.readouterr().err
