"""Runs on GKE, through xpk: `python -m launch.gke VERB ... --zone=... [flags]`.

    cluster_create CLUSTER   a cluster with node pools of a slice    cluster_delete CLUSTER
    run NAME --cluster=...   start a run: the command of launch.tpu, in a container on all machines
    list --cluster=...       its runs    logs NAME --cluster=...     delete NAME --cluster=...

The cluster starts a run again after preemptions and crashes (`--max_restarts`), from its last
checkpoint. xpk: `pip install xpk`, with docker, kubectl and gcloud beside it; its flags are those of
version 1.16. Each command is printed before it runs; `--dry-run` prints alone.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import pathlib
import shlex
import shutil
import sys
import tempfile

from launch import arguments as arguments_lib
from launch import code
from launch import settings
from launch import shell
from llm_jax import config as config_lib
from llm_jax import errors

_IMAGE = "python:3.12"  # has nothing: launch/worker.sh installs, as it does on TPU VMs
_UNKNOWN_TO_XPK = ("v5litepod-1", "v5litepod-4")
_RESTART_CODES = "1"  # crashes; xpk adds 42 and 127 to 255, so a usage error (2) alone ends a run


def _place(options: argparse.Namespace) -> tuple[str, ...]:
    return (
        f"--cluster={options.cluster}",
        f"--project={options.project}",
        f"--zone={options.zone}",
    )


def _chips(
    options: argparse.Namespace, config: config_lib.RunConfig | None = None
) -> settings.Slice:
    chosen = arguments_lib.chosen_slice(options, config)
    if not options.any_zone:
        settings.check_zone(options.zone, chosen.generation)
    return chosen


def _chip_flags(chosen: settings.Slice) -> tuple[str, ...]:
    kind = chosen.accelerator_type
    if kind in _UNKNOWN_TO_XPK:
        raise errors.UserError(f"xpk has no {kind} ({chosen.name}); take launch.tpu, or 8 chips")
    if chosen.generation.chip == "tpu7x":  # which xpk names by its shape
        kind = f"{chosen.generation.accelerator_prefix}-{chosen.shape}"
    return (f"--tpu-type={kind}", f"--num-slices={chosen.num_slices}")


def cluster_create(options: argparse.Namespace, sh: shell.Shell) -> int:
    chosen = _chips(options)
    tier = "--spot" if options.spot else "--on-demand"
    if options.reservation:
        tier = f"--reservation={options.reservation}"
    sh.show("xpk", "cluster", "create", *_place(options), *_chip_flags(chosen), tier)
    if not sh.is_dry:
        shell.say(f"billed from now on, run or not, and the cluster besides: {chosen.cost()}")
    return 0


def cluster_delete(options: argparse.Namespace, sh: shell.Shell) -> int:
    if not sh.is_dry:
        shell.confirm(f"Delete cluster {options.cluster}, its nodes and all its runs?", options.yes)
    sh.show("xpk", "cluster", "delete", *_place(options), "--force")
    return 0


def container_command(options: argparse.Namespace, chosen: settings.Slice) -> str:
    """Returns what a container runs, in the folder of the code: one line, since xpk puts it into
    YAML. The last process takes the place of the shell, so that SIGTERM reaches it."""
    variables = arguments_lib.environment(options, chosen)
    words = ["env", *(f"{name}={value}" for name, value in variables.items())]
    words += ["bash", "launch/worker.sh", "foreground", options.name]
    words += [f"--workdir={options.workdir.rstrip('/')}", "--"]
    words += arguments_lib.train_arguments(options)
    line = f"exec {shlex.join(words)}"
    line = f"{options.before} && {line}" if options.before else line
    if "\n" in line:
        raise errors.UserError("--env, --before and settings must be of one line for xpk")
    return line


def run(options: argparse.Namespace, sh: shell.Shell) -> int:
    config = arguments_lib.load_config(options)
    chosen = _chips(options, config)
    arguments_lib.check_workdir(options.workdir)
    if options.secret:
        raise errors.UserError(
            "--secret needs gcloud in the container; on GKE, mount a Kubernetes secret or pass an image"
            " with gcloud by --base_image and read it by --before"
        )
    line = container_command(options, chosen)
    extra = arguments_lib.config_path(options)
    arguments_lib.check_cloud(sh, options, workdir=options.workdir, accelerator=None)
    identity = code.identity(code.ROOT, [extra])
    stage = pathlib.Path(tempfile.gettempdir()) / f"llm_jax-{identity}"
    archive = f"{stage}.tar.gz"
    sh.call(code, f"--output={archive}", f"--extra={extra}")
    sh.run("mkdir", "-p", str(stage))
    sh.run("tar", "-xzf", archive, "-C", str(stage))
    sh.show(
        *("xpk", "workload", "create", *_place(options), f"--workload={options.name}"),
        *_chip_flags(chosen),
        *(f"--base-docker-image={options.base_image}", f"--script-dir={stage}"),
        *(f"--max-restarts={options.max_restarts}", f"--restart-on-exit-codes={_RESTART_CODES}"),
        *(f"--termination-grace-period-seconds={options.grace_seconds}", f"--command={line}"),
    )
    if not sh.is_dry:
        shutil.rmtree(stage)
    return 0


def list_verb(options: argparse.Namespace, sh: shell.Shell) -> int:
    sh.show("xpk", "workload", "list", *_place(options))
    return 0


def logs(options: argparse.Namespace, sh: shell.Shell) -> int:
    pod = f"{options.name}-slice-job-{options.node}-{options.worker}-"
    wanted = (
        'resource.type="k8s_container"'
        f' AND resource.labels.cluster_name="{options.cluster}"'
        f' AND resource.labels.pod_name:"{pod}"'
    )
    sh.show(
        *("gcloud", "logging", "read", wanted, f"--project={options.project}"),
        *(f"--limit={options.lines}", f"--freshness={options.freshness}"),
        "--format=value(timestamp,textPayload)",
    )
    return 0


def delete(options: argparse.Namespace, sh: shell.Shell) -> int:
    if not sh.is_dry:
        shell.confirm(f"Delete the run {options.name} of {options.cluster}?", options.yes)
    sh.show("xpk", "workload", "delete", *_place(options), f"--workload={options.name}", "--force")
    shell.say("the cluster and its chips are still there and billed: cluster_delete")
    return 0


_VERBS: dict[str, Callable[[argparse.Namespace, shell.Shell], int]] = {
    "cluster_create": cluster_create,
    "cluster_delete": cluster_delete,
    "run": run,
    "list": list_verb,
    "logs": logs,
    "delete": delete,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.gke",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    added = {}
    for verb in _VERBS:
        added[verb] = verbs.add_parser(verb, allow_abbrev=False)
        if verb in ("run", "logs", "delete"):
            added[verb].add_argument("name", help="of the run")
        if verb.startswith("cluster"):
            added[verb].add_argument("cluster")
        else:
            added[verb].add_argument("--cluster", required=True)
        arguments_lib.add_place(added[verb])
    arguments_lib.add_slice(added["cluster_create"], has_reserved=False)
    added["cluster_create"].add_argument(
        "--reservation", help="name of the reservation to take from"
    )
    arguments_lib.add_slice(added["run"], has_tier=False)
    arguments_lib.add_run(added["run"])
    added["run"].add_argument("--base_image", default=_IMAGE)
    added["run"].add_argument("--max_restarts", type=int, default=50)
    added["run"].add_argument(
        "--grace_seconds", type=int, default=120, help="for saving on SIGTERM"
    )
    added["logs"].add_argument("--node", default="0", help="slice")
    added["logs"].add_argument("--worker", default="0", help="machine of the slice")
    added["logs"].add_argument("--lines", type=int, default=100)
    added["logs"].add_argument("--freshness", default="1d")
    for verb in ("delete", "cluster_delete"):
        added[verb].add_argument("--yes", action="store_true", help="do not ask")
    return parser


def main(argv: Sequence[str] | None = None, sh: shell.Shell | None = None) -> int:
    """Runs a verb; returns its exit code: 2 for a mistake of the caller, 1 for a failed command."""
    return arguments_lib.main(_parser(), _VERBS, argv, sh or shell.Shell())


if __name__ == "__main__":
    sys.exit(main())
