"""Runs command lines of one module as real processes, of which only the first imports everything."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

# Forks a child for each command line.
_RUN = """
import importlib, json, os, sys
from llm_jax import command
module = importlib.import_module(sys.argv[1])

results = []
for index, argv in enumerate(json.loads(sys.argv[2])):
    pid = os.fork()
    if pid == 0:
        for name, fd in (("out", 1), ("err", 2)):
            file = os.open(f"{index}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, fd)
        sys.argv = [sys.argv[1], *argv]
        command.run(module.main, module.define_flags)
    results.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(results))
"""


def child_environment() -> dict[str, str]:
    """Returns the environment of a process with one CPU device and this code."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def run(module: str, folder: pathlib.Path, argvs: list[list[str]]) -> list[tuple[int, str, str]]:
    """Returns the exit code, stdout and stderr of each command line, run in `folder`."""
    ran = subprocess.run(
        [sys.executable, "-c", _RUN, module, json.dumps(argvs)],
        cwd=folder,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    codes = json.loads(ran.stdout.splitlines()[-1])
    return [
        (code, (folder / f"{i}.out").read_text(), (folder / f"{i}.err").read_text())
        for i, code in enumerate(codes)
    ]
