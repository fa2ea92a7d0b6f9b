"""Runs on Cloud TPU VMs, by queued resources: `python -m launch.tpu VERB NAME --zone=... [flags]`.

    watch    all of it: create, set up, run, and again after each preemption, until the run has finished
    create   ask for the chips          setup   install on all machines
    run      start the training on all machines; a second call goes on from the last checkpoint
    stop     let it save and end        status  of the chips and of each machine
    logs     follow a machine's log     fetch   copy metrics and logs of a workdir here
    delete   give the chips back        list    what there is in a zone, and what is billed

Each command of gcloud is printed before it runs; `--dry-run` prints alone. README.md beside this file
begins with an empty project.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import pathlib
import sys

from launch import arguments as arguments_lib
from launch import code
from launch import job as job_lib
from launch import settings
from launch import shell
from launch import watch as watch_lib
from llm_jax import config as config_lib
from llm_jax import errors

_STATES_THAT_BILL = ("ACTIVE", "SUSPENDING", "DELETING")

# --- verbs ----------------------------------------------------------------------------------------


def _place(options: argparse.Namespace) -> job_lib.Place:
    return job_lib.Place(options.name, options.project, options.zone, options.ssh)


def _chips(options: argparse.Namespace, config: config_lib.RunConfig | None) -> settings.Slice:
    chosen = arguments_lib.chosen_slice(options, config)
    if chosen.generation.runtime_version is None:
        raise errors.UserError(
            f"there are no TPU VMs of {chosen.generation.chip}, it is in GKE alone: python -m launch.gke"
        )
    if not options.any_zone:
        settings.check_zone(options.zone, chosen.generation)
    return chosen


def _job(
    options: argparse.Namespace, config: config_lib.RunConfig
) -> tuple[job_lib.Job, settings.Slice]:
    """Returns a checked job and its chips; asks nobody."""
    chosen = _chips(options, config)
    arguments_lib.check_workdir(options.workdir)
    extra = arguments_lib.config_path(options)
    left = [
        name
        for name in code.untracked(code.ROOT)
        if pathlib.Path(extra).resolve() != code.ROOT / name
    ]
    if left:
        shell.say(f"warning: git does not track {', '.join(left[:5])}: not shipped")
    job = job_lib.Job(
        place=_place(options),
        workdir=options.workdir.rstrip("/"),
        variables=arguments_lib.environment(options, chosen),
        train_arguments=tuple(arguments_lib.train_arguments(options)),
        code_id=code.identity(code.ROOT, [extra]),
        extra=extra,
        before=options.before,
    )
    return job, chosen


def create(options: argparse.Namespace, sh: shell.Shell) -> int:
    config = arguments_lib.load_config(options) if options.config else None
    chosen = _chips(options, config)
    place = _place(options)
    arguments_lib.check_cloud(sh, options, workdir=options.workdir, accelerator=chosen)
    found = place.describe(sh)
    if found is not None:
        state = watch_lib.state_of(found)
        shell.say(f"{place.name} is there already ({state}); nothing was asked for")
        return 0
    sh.run(*job_lib.create_command(place, chosen, options))
    if sh.is_dry:
        return 0
    shell.say(f"asked for {chosen.name} as {place.name}; once it is ACTIVE: {chosen.cost()}")
    return 0


def setup(options: argparse.Namespace, sh: shell.Shell) -> int:
    job, _ = _job(options, arguments_lib.load_config(options))
    arguments_lib.check_cloud(sh, options, workdir=job.workdir, accelerator=None)
    job.ship(sh)
    job.set_up(sh)
    return 0


def run(options: argparse.Namespace, sh: shell.Shell) -> int:
    job, _ = _job(options, arguments_lib.load_config(options))
    arguments_lib.check_cloud(sh, options, workdir=job.workdir, accelerator=None)
    job.ship(sh)
    job.start(sh)
    shell.say(f"follow it: python -m launch.tpu logs {job.place.name} {' '.join(job.place.flags)}")
    return 0


def watch(options: argparse.Namespace, sh: shell.Shell) -> int:
    config = arguments_lib.load_config(options)
    job, chosen = _job(options, config)
    arguments_lib.check_cloud(sh, options, workdir=job.workdir, accelerator=chosen)
    job.ship(sh)  # now, not at each start: edits that are made meanwhile are of the next run
    limits = watch_lib.Limits(options.poll_seconds, options.check_every, options.max_retries)
    create_it = job_lib.create_command(job.place, chosen, options)
    watcher = watch_lib.Watcher(
        sh, job, create_it, config.train.num_steps, limits, job_lib.status_line(job.place)
    )
    try:
        return watcher.run()
    finally:
        if options.delete_after and watcher.is_over:
            job.place.delete(sh)
        elif not sh.is_dry:
            bill = f"{job.place.name} is not deleted. While ACTIVE: {chosen.cost()}"
            shell.say(f"{bill}. To end that: {_delete_line(job.place)}")


def _delete_line(place: job_lib.Place) -> str:
    return f"python -m launch.tpu delete {place.name} {' '.join(place.flags)}"


def stop_verb(options: argparse.Namespace, sh: shell.Shell) -> int:
    job_lib.stop(sh, _place(options), is_final=True)
    shell.say(f"the chips are still there and billed: {_delete_line(_place(options))}")
    return 0


def logs(options: argparse.Namespace, sh: shell.Shell) -> int:
    place = _place(options)
    follow = "" if options.no_follow else " -F"
    line = f"tail -n {options.lines}{follow} {job_lib.HOME}/{place.name}/log.txt"
    where = (f"--node={options.node}", f"--worker={options.worker}", *place.ssh_flags)
    sh.show(*job_lib.QUEUED, "ssh", place.name, *place.flags, *where, f"--command={line}")
    return 0


def status(options: argparse.Namespace, sh: shell.Shell) -> int:
    place = _place(options)
    found = place.describe(sh)
    if found is None and not sh.is_dry:
        shell.say(f"there is no {place.name} in {place.zone}: nothing runs, nothing is billed")
        return 0
    state = watch_lib.state_of(found)
    reason = watch_lib.failure_of(found)
    if not sh.is_dry:
        print(f"{place.name}: {state}{f' ({reason})' if reason else ''}", file=sys.stderr)
    if state == "ACTIVE" or sh.is_dry:
        for node in place.nodes(sh):
            print(f"{node['name'].rpartition('/')[2]}: {node.get('state')}", file=sys.stderr)
        print(place.on_all(sh, job_lib.status_line(place), retries=0), end="", file=sys.stderr)
    return 0


def fetch(options: argparse.Namespace, sh: shell.Shell) -> int:
    arguments_lib.check_workdir(options.workdir)
    source, target = options.workdir.rstrip("/"), pathlib.Path(options.output)
    if not sh.is_dry:
        target.mkdir(parents=True, exist_ok=True)
    line = ["gcloud", "storage", "rsync", "--recursive", source, str(target)]
    if not options.checkpoints:
        line += [r"--exclude=^checkpoints(_damaged)?/.*|^launch/code-.*|^profile/.*"]
    sh.show(*line, f"--project={options.project}")
    return 0


def delete(options: argparse.Namespace, sh: shell.Shell) -> int:
    place = _place(options)
    found = place.describe(sh)
    if found is None and not sh.is_dry:
        shell.say(f"there is no {place.name} in {place.zone}: nothing to delete")
        return 0
    if not sh.is_dry:
        question = f"Delete {place.name} ({watch_lib.state_of(found)}) and its machines?"
        shell.confirm(question, options.yes)
    place.delete(sh)
    if not sh.is_dry:
        shell.say("workdir and bucket stay; they are billed by size")
    return 0


def list_verb(options: argparse.Namespace, sh: shell.Shell) -> int:
    place = (f"--zone={options.zone}", f"--project={options.project}")
    found = sh.read(*job_lib.QUEUED, "list", *place, "--format=json") or []
    for resource in found:
        kinds = [spec.get("node", {}) for spec in resource.get("tpu", {}).get("nodeSpec", [])]
        kind = ", ".join(node.get("acceleratorType", "?") for node in kinds)
        state = watch_lib.state_of(resource)
        note = "billed" if state in _STATES_THAT_BILL else "not billed, but counts against quota"
        name = resource["name"].rpartition("/")[2]
        print(f"{name}  {kind}  {state} ({note})", file=sys.stderr)
    if not found and not sh.is_dry:
        shell.say(f"no queued resources in {options.zone}; other zones are listed one by one")
    return 0


# --- the command ----------------------------------------------------------------------------------

_VERBS: dict[str, Callable[[argparse.Namespace, shell.Shell], int]] = {
    "create": create,
    "setup": setup,
    "run": run,
    "watch": watch,
    "stop": stop_verb,
    "status": status,
    "logs": logs,
    "fetch": fetch,
    "delete": delete,
    "list": list_verb,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.tpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    added = {}
    for verb in _VERBS:
        added[verb] = verbs.add_parser(verb, allow_abbrev=False)
        if verb not in ("list", "fetch"):
            added[verb].add_argument("name", help="of the queued resource and the run")
            added[verb].add_argument(
                "--ssh", choices=("external", "internal", "iap"), default="external"
            )
        arguments_lib.add_place(added[verb])
    for verb in ("create", "setup", "run", "watch"):
        arguments_lib.add_slice(added[verb])
        arguments_lib.add_run(added[verb])
    for verb in ("create", "watch"):
        _add_creation(added[verb])
    watching = added["watch"]
    watching.add_argument("--poll_seconds", type=float, default=60.0)
    watching.add_argument("--check_every", type=int, default=10, help="polls between looks by ssh")
    watching.add_argument(
        "--max_retries", type=int, default=8, help="starts without a new checkpoint between them"
    )
    watching.add_argument(
        "--delete_after", action="store_true", help="delete the chips when it ends, however it ends"
    )
    added["logs"].add_argument("--node", default="0", help="slice")
    added["logs"].add_argument("--worker", default="0", help="machine of the slice")
    added["logs"].add_argument("--lines", type=int, default=100)
    added["logs"].add_argument("--no_follow", action="store_true")
    added["fetch"].add_argument("--workdir", required=True)
    added["fetch"].add_argument("--output", required=True, help="folder here")
    added["fetch"].add_argument("--checkpoints", action="store_true", help="these, too: large")
    added["delete"].add_argument("--yes", action="store_true", help="do not ask")
    return parser


def _add_creation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runtime_version", help="of the VMs; default: by the chips")
    parser.add_argument("--service_account", help="whose roles the machines have")
    parser.add_argument("--network")
    parser.add_argument("--subnetwork")
    parser.add_argument(
        "--valid_until_duration", help="how long to queue, e.g. 6h; default: for ever"
    )


def main(argv: Sequence[str] | None = None, sh: shell.Shell | None = None) -> int:
    """Runs a verb; returns its exit code: 2 for a mistake of the caller, 1 for a failed command."""
    return arguments_lib.main(_parser(), _VERBS, argv, sh or shell.Shell())


if __name__ == "__main__":
    sys.exit(main())
