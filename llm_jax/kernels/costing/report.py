"""The trust report of the kernels: `python -m llm_jax.kernels.costing.report` writes it.

Errors come from running the kernels, interpreted; times from the TPU compiler's schedule
(`llm_jax.aot`). An hour on two cores; with `--cache` what is done already is not done again.
"""

from collections.abc import Iterable
import datetime
import importlib.metadata
import pathlib
import platform

from absl import flags
import jax

from llm_jax import command
from llm_jax.aot import topology
from llm_jax.kernels.costing import attention_tables
from llm_jax.kernels.costing import program_tables

PATH = pathlib.Path(__file__).parents[1] / "README.md"


def define_flags() -> None:
    flags.DEFINE_string("cache", None, "Folder that keeps what each program costs.")
    flags.DEFINE_integer("processes", 1, "Compilations side by side.", lower_bound=1)


def main() -> None:
    topology.require_libtpu()
    given = flags.FLAGS.cache, flags.FLAGS.processes
    wanted = {
        "Beside other kernels": attention_tables.race_rows,
        "What attention costs by what it does": attention_tables.feature_rows,
        "Decoding": program_tables.decode_rows,
        "Cross-entropy": program_tables.loss_rows,
        "Training steps": program_tables.step_rows,
    }
    sections = [_introduction(), _section("Errors", attention_tables.accuracy_rows())]
    for title, rows in wanted.items():
        print(title, flush=True)
        sections.append(_section(title, rows(*given)))
    PATH.write_text("\n\n".join(sections) + "\n")
    print(f"written: {PATH}")


def _introduction() -> str:
    versions = [f"jax {jax.__version__}"]
    for name in ("libtpu", "tokamax"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    return "\n".join(
        [
            "# Kernels: what they get wrong and what they cost",
            "",
            f"Written by `python -m llm_jax.kernels.costing.report` on {datetime.date.today()}:"
            f" {', '.join(versions)}; {platform.machine()}, no TPU.",
            "",
            "**Nothing here was measured on a TPU.** Times are modelled: the TPU compiler's own"
            " schedule, executed by `llm_jax.aot`, which says how and how well. Ratios of programs"
            " for one chip are what to trust.",
        ]
    )


def _section(title: str, rows: Iterable[str]) -> str:
    return "\n".join([f"## {title}", "", *rows])


if __name__ == "__main__":
    command.run(main, define_flags)
