"""Trains what is missing of the comparison: `python -m experiments.moe_routing.run --workers=2`.

Each run is `python -m llm_jax.train` in a process of its own, on a core of its own where the system can
say so. Its result is kept in `results/VARIANT-SEED.json`, with the settings that it is of: a run whose
settings have changed since is made again.
"""

from collections.abc import Iterator
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from absl import app
from absl import flags

from experiments.moe_routing import variants
from llm_jax import config as config_lib
from llm_jax import metrics
from llm_jax.checkpoint import mismatch

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
_LOSS = "eval/validation/loss"  # nats a byte
_TAIL = 0.25  # the last part of a run, over which routing is averaged

_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each variant.", lower_bound=1)
_WORKERS = flags.DEFINE_integer("workers", 2, "Runs side by side.", lower_bound=1)
_ONLY = flags.DEFINE_list("only", [], "Variants; none: all.")


@dataclasses.dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    variant: str
    seed: int

    @property
    def path(self) -> pathlib.Path:
        return RESULTS / f"{self.variant}-{self.seed}.json"

    def fingerprint(self) -> str:
        """Returns a hash of the settings that are not at their defaults.

        So a setting that the code gets later, which changes nothing by itself, leaves runs what they are.
        """
        raw = variants.get_config(self.variant)
        raw.train.seed = self.seed
        config = config_lib.from_config_dict(raw)
        changed = mismatch.differing(config_lib.RunConfig(), config)
        settings = {name: value for name, (_, value) in changed.items()}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def is_done(self) -> bool:
        if not self.path.exists():
            return False
        return json.loads(self.path.read_text())["settings"] == self.fingerprint()


def summary(rows: list[dict]) -> dict:
    """Returns what is kept of a run's metrics."""
    trained = [row for row in rows if "train/loss" in row]
    tail = trained[-max(1, int(len(trained) * _TAIL)) :]
    names = sorted(name for name in tail[-1] if name.startswith("moe/") and "layers" not in name)
    speeds = [row["perf/tokens_per_second"] for row in trained[1:]]
    return {
        "loss": [row[_LOSS] for row in rows if _LOSS in row][-1],
        "train_loss": [[row["step"], row["train/loss"]] for row in trained],
        "tokens_per_second": statistics.median(speeds),
        "routing": {name: statistics.mean(row[name] for row in tail) for name in names},
        "load": [
            [row["step"], row["moe/layers/load"]] for row in trained if "moe/layers/load" in row
        ],
    }


def train(run: Run, core: int | None) -> str | None:
    """Trains and keeps the result; returns what went wrong, if something did."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "llm_jax.train", f"--workdir={folder}/run"]
        command += [f"--config={HERE}/variants.py:{run.variant}", f"--config.train.seed={run.seed}"]
        pin = None if core is None else lambda: os.sched_setaffinity(0, {core})
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=pin,
            cwd=HERE.parents[1],
        )
        if done.returncode:
            return f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        kept = {"settings": run.fingerprint()} | summary(metrics.read(f"{folder}/run"))
    RESULTS.mkdir(exist_ok=True)
    partial = run.path.with_suffix(".tmp")
    partial.write_text(json.dumps(kept) + "\n")
    partial.rename(run.path)
    return None


def _cores() -> Iterator[int | None]:
    """Yields a core for each worker; None where the system pins nothing, or has fewer cores."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if has_affinity else []
    yield from cores[: _WORKERS.value] if len(cores) >= _WORKERS.value else [None] * _WORKERS.value


def main(argv: list[str]) -> None:
    del argv
    unknown = set(_ONLY.value) - set(variants.VARIANTS)
    if unknown:
        sys.exit(f"--only: {', '.join(sorted(unknown))} not among {', '.join(variants.VARIANTS)}")
    variants.check_budgets()
    names = _ONLY.value or list(variants.VARIANTS)
    runs = [Run(name, seed) for seed in range(_SEEDS.value) for name in names]
    missing = [run for run in runs if not run.is_done()]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} done", flush=True)
    free, lock, started, failures = list(_cores()), threading.Lock(), time.monotonic(), []

    def one(run: Run) -> None:
        with lock:
            core = free.pop()
        problem = train(run, core)
        with lock:
            free.append(core)
            failures.extend([f"{run.variant}, seed {run.seed}: {problem}"] if problem else [])
            finished = sum(run.is_done() for run in missing) + len(failures)
            left = (time.monotonic() - started) / finished * (len(missing) - finished)
            state = problem or "done"
            print(f"{run.variant}-{run.seed} {state}; {left / 60:.0f} minutes left", flush=True)

    with concurrent.futures.ThreadPoolExecutor(_WORKERS.value) as pool:
        list(pool.map(one, missing))
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    app.run(main)
