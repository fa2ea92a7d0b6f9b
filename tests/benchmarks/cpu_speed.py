"""Speed on a CPU beside PyTorch: training and sampling, in one interleaved run.

    python tests/benchmarks/cpu_speed.py                                 # llm_jax alone
    python tests/benchmarks/cpu_speed.py --peer_python=path/to/python    # a Python with torch
    python tests/benchmarks/cpu_speed.py --cases=train_char,sample_1 --rounds=5

Each round starts every program anew, one after the other, so that a noisy neighbour hits all of
them; the table gives medians over the rounds, and ratios to the faster dtype of the peer.
"""

import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

from absl import app
from absl import flags

_HERE = pathlib.Path(__file__).parent
_ALL = ("train_char", "train_gpt2", "tune_bert", "train_t5", "sample_1", "sample_16")
_ALL += ("write_t5", "beams_t5")

_CASES = flags.DEFINE_list("cases", ",".join(_ALL), "What to measure.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that each program is started.")
_PEER = flags.DEFINE_string("peer_python", None, "Python with torch and transformers.")


def _run(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _commands(case: str) -> list[list[str]]:
    commands = [[sys.executable, str(_HERE / "worker.py"), f"--case={case}"]]
    if _PEER.value:
        commands += [
            [_PEER.value, str(_HERE / "peer_torch.py"), case, dtype]
            for dtype in ("float32", "bfloat16")
        ]
    return commands


def _table(case: str, rows: dict[str, list[dict]]) -> None:
    speeds = {
        program: statistics.median(
            row["tokens"] / statistics.median(row["wall"]) for row in of_program
        )
        for program, of_program in rows.items()
    }
    seconds = {
        program: statistics.median(statistics.median(row["cpu"]) for row in of_program)
        for program, of_program in rows.items()
    }
    ours, *peers = speeds
    print(f"\n{case}")
    for program, speed in speeds.items():
        print(f"  {program:55} {speed:10,.0f} tokens/s {seconds[program]:9.3f} CPU seconds")
    if peers:
        best = max(speeds[peer] for peer in peers)
        thriftiest = min(seconds[peer] for peer in peers)
        print(
            f"  ratio to the best peer: {speeds[ours] / best:.2f} in tokens/s,"
            f" {thriftiest / seconds[ours]:.2f} in CPU seconds"
        )


def main(argv: list[str]) -> None:
    del argv
    unknown = set(_CASES.value) - set(_ALL)
    if unknown:
        sys.exit(f"--cases: {', '.join(sorted(unknown))} not among {', '.join(_ALL)}")
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}")
    for case in _CASES.value:
        rows: dict[str, list[dict]] = {}
        for _ in range(_ROUNDS.value):
            for command in _commands(case):
                row = _run(command)
                rows.setdefault(row["program"], []).append(row)
        _table(case, rows)


if __name__ == "__main__":
    app.run(main)
