"""Makes the runs that an ablation lacks, and writes its report: `python -m experiments.run NAME`.

    --seeds=5 --only=a,b      more seeds, fewer variants (then there is no report: it is of all)
    --workers=2               runs side by side, each on cores of its own
    --costs                   compile the full-size variants, too: minutes each
    --report                  write the report from what there is; nothing runs
    --slices='--project=P --zone=Z' --bucket=gs://B/F    each run on a slice of its own, by launch.tpu

What was done is not done again, what was interrupted goes on, what fails is told at the end. Names are folders of
`experiments` with a `sweep.py`.
"""

import dataclasses
import importlib
import pathlib
import sys

from absl import flags
import jax

from llm_jax import command
from llm_jax import errors
from llm_jax.lab import analysis
from llm_jax.lab import cost
from llm_jax.lab import ledger
from llm_jax.lab import report
from llm_jax.lab import results
from llm_jax.lab import runner
from llm_jax.lab import sweep as sweep_lib

FOLDER = pathlib.Path(__file__).parent
MARKS = ("<!-- ledger: begin -->", "<!-- ledger: end -->")


def load(name: str) -> sweep_lib.Sweep:
    """Returns the sweep of a folder; raises UserError where there is none."""
    known = sorted(path.parent.name for path in FOLDER.glob("*/sweep.py"))
    if name not in known:
        raise errors.UserError(
            f"{name!r} is no ablation{errors.nearest(name, known)}: there are {', '.join(known) or 'none'}"
        )
    return importlib.import_module(f"experiments.{name}.sweep").SWEEP


def define_flags() -> None:
    command.define_argument("NAME", "Ablation: a folder of experiments with a sweep.py.")
    flags.DEFINE_integer("seeds", None, "Runs of each variant; the sweep's number if not given.", 1)
    flags.DEFINE_list("only", [], "Variants; none: all.")
    flags.DEFINE_integer("workers", 1, "Runs side by side.", 1)
    flags.DEFINE_string("runs", "runs/lab", "Folder of workdirs, of runs that are not done.")
    flags.DEFINE_boolean("keep", False, "Keep the workdirs of runs that are done.")
    flags.DEFINE_boolean("costs", False, "Compile what is missing of the full-size variants.")
    flags.DEFINE_boolean("report", False, "Write the report from what there is.")
    flags.DEFINE_string("slices", None, "Flags of launch.tpu: run on slices.")
    flags.DEFINE_string("bucket", None, "With --slices: gs://BUCKET/FOLDER of workdirs.")


def main() -> int:
    given, name = flags.FLAGS, command.argument("NAME")
    jax.config.update("jax_platforms", "cpu")
    sweep, folder = load(name), FOLDER / name
    if given.seeds is not None:
        sweep = dataclasses.replace(sweep, seeds=given.seeds)
    kept = results.Results(folder, sweep)
    if not given.report:
        executor = _executor(name)
        failures = runner.run_missing(
            sweep, kept, sweep.runs(given.only), executor, given.workers, _say
        )
        further = [] if failures else analysis.further_runs(sweep, kept, given.only)
        if further:
            _say(f"{sweep.name}: values are chosen; the seeds that did not choose")
            failures = runner.run_missing(sweep, kept, further, executor, given.workers, _say)
        for failure in failures:
            print(f"failed: {failure.run}: {failure.said}", file=sys.stderr)
        if failures:
            return 1
    if given.costs:
        cost.compile_missing(folder, sweep, say=_say)
    if given.only and not given.report:
        return 0
    table = report.write(folder, sweep)
    print(report.texts_of(report.rows(table, cost.read(folder, sweep))))
    print("\n".join(report.conclusions(table)))
    ledger.write(FOLDER, *MARKS)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _executor(name: str) -> runner.Local:
    given = flags.FLAGS
    how = {
        "root": FOLDER.parent,
        "config": f"experiments/{name}/sweep.py",
        "workdirs": pathlib.Path(given.runs).expanduser().resolve() / name,
        "is_kept": given.keep,
    }
    if (given.slices is None) != (given.bucket is None):
        raise errors.UserError("--slices and --bucket go together: what to run on, and where to")
    if given.slices is None:
        return runner.Local(**how)
    return runner.Slices(**how, arguments=given.slices, bucket=given.bucket.rstrip("/"))


if __name__ == "__main__":
    command.run(main, define_flags)
