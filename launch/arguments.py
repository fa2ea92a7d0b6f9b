"""Flags that the launchers share, and what is checked before anything is billed."""

import argparse
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import os
import pathlib
import re
import sys

from launch import code
from launch import settings
from launch import shell
from launch import worker
from llm_jax import command
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import xla_flags

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # what TPU VMs and xpk both take
_PROJECT = re.compile(r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]")
_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z0-9]+")
_WORKDIR = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])((?:/[A-Za-z0-9._=-]+)+)")
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_SECRET = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=([A-Za-z0-9_-]+)")
_LOOKS_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def add_place(parser: argparse.ArgumentParser) -> None:
    """Adds what every verb needs: the project, the zone and `--dry-run`."""
    parser.add_argument(
        "--project",
        default=os.environ.get("CLOUDSDK_CORE_PROJECT"),
        help="Google Cloud project; default: $CLOUDSDK_CORE_PROJECT",
    )
    parser.add_argument(
        "--zone",
        default=os.environ.get("CLOUDSDK_COMPUTE_ZONE"),
        help="zone, e.g. us-west4-a; default: $CLOUDSDK_COMPUTE_ZONE",
    )
    parser.add_argument(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="print the commands, run none, touch nothing",
    )


def add_slice(
    parser: argparse.ArgumentParser, *, has_tier: bool = True, has_reserved: bool = True
) -> None:
    """Adds which chips, and how they are paid for."""
    parser.add_argument("--slice", help="v5e:4x8, 2*v5e:16x16, ...; default: that of --config")
    tier = parser.add_mutually_exclusive_group()
    if has_tier:
        tier.add_argument("--spot", action="store_true", help="cheaper, and may be taken away")
    if has_tier and has_reserved:
        tier.add_argument("--reserved", action="store_true", help="from the project's reservation")
    parser.add_argument("--any_zone", action="store_true", help="also one that our table lacks")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds what is run. Overrides `--config.x.y=z` need no flags here: they are what is left over."""
    parser.add_argument("--config", help="config file, in this repository")
    parser.add_argument("--workdir", help="gs://BUCKET/PATH: all that a run leaves behind")
    parser.add_argument("--allow_other_slice", action="store_true", help="than the config names")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME=SECRET",
        help="environment variable from a secret in the project's Secret Manager",
    )
    parser.add_argument(
        "--before",
        metavar="COMMAND",
        help="run in the code's folder of each machine first: to fetch tokenizers or data",
    )
    parser.add_argument(
        "--xla_flags", default="", help="added to the flags of llm_jax/xla_flags.py"
    )


def main(
    parser: argparse.ArgumentParser,
    verbs: Mapping[str, Callable[[argparse.Namespace, shell.Shell], int]],
    argv: Sequence[str] | None,
    sh: shell.Shell,
) -> int:
    """Runs a verb; returns its exit code: 2 for a mistake of the caller, 1 for a failed command."""
    try:
        options = parse(parser, sys.argv[1:] if argv is None else argv)
        sh = dataclasses.replace(sh, is_dry=options.dry_run)
        return verbs[options.verb](options, sh)
    except errors.UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, shell.CommandError) else 2
    except KeyboardInterrupt:
        print("interrupted: what was started goes on", file=sys.stderr)
        return 130


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses; what is left over must be overrides of the config, kept as `overrides`.

    Raises:
      errors.UserError: a flag that is none, a missing project or zone, a malformed name.
    """
    arguments, rest = parser.parse_known_args(argv)
    for item in rest:
        if not re.match(r"--(no)?config\.", item):
            raise errors.UserError(
                f"'{item}' is not a flag of '{arguments.verb}'; settings are --config.x.y=value,"
                f" and {parser.prog} {arguments.verb} --help lists the flags"
            )
        if not hasattr(arguments, "config"):
            raise errors.UserError(f"'{item}': '{arguments.verb}' takes no settings")
    arguments.overrides = rest
    _check_place(arguments)
    return arguments


def _check_place(arguments: argparse.Namespace) -> None:
    for named in ("name", "cluster"):
        if getattr(arguments, named, None) is not None:
            check_name(getattr(arguments, named))
    for flag, pattern, example in (
        ("project", _PROJECT, "my-project-123"),
        ("zone", _ZONE, "us-west4-a"),
    ):
        value = getattr(arguments, flag)
        if not value:
            raise errors.UserError(f"--{flag} is missing, e.g. --{flag}={example}")
        if not pattern.fullmatch(value):
            raise errors.UserError(f"--{flag}={value} cannot be the name of one; such as {example}")


def check_name(name: str) -> None:
    """Raises `errors.UserError` for a name that Google Cloud does not take."""
    if not _NAME.fullmatch(name):
        raise errors.UserError(
            f"'{name}' will not do as a name: lower-case letters, digits and '-', a letter first, at"
            " most 40 characters"
        )


def check_workdir(workdir: str | None) -> str:
    """Returns the bucket of a workdir; raises `errors.UserError` if it is none on gs://."""
    match = _WORKDIR.fullmatch(workdir or "")
    if match is None:
        raise errors.UserError(
            f"--workdir={workdir or ''} will not do: a run whose machine may go needs a folder in a"
            " bucket, gs://BUCKET/PATH (letters, digits, '._=-')"
        )
    return match[1]


def load_config(arguments: argparse.Namespace) -> config_lib.RunConfig:
    """Returns the config that a run would have.

    Raises:
      errors.UserError: it is missing or wrong, or lies where it would not be shipped.
    """
    if not arguments.config:
        raise errors.UserError("--config is missing: the config file of the run")
    config = command.load_config(arguments.config, arguments.overrides)
    code.files(code.ROOT, [config_path(arguments)])
    return config


def config_path(arguments: argparse.Namespace) -> str:
    """Returns the file of `--config=FILE[:arg]`."""
    return arguments.config.partition(":")[0]


def train_arguments(arguments: argparse.Namespace) -> list[str]:
    """Returns what the training is called with in the folder of the shipped code."""
    file, colon, argument = arguments.config.partition(":")
    inside = pathlib.Path(file).resolve().relative_to(code.ROOT)
    return [f"--config={inside}{colon}{argument}", *arguments.overrides]


def chosen_slice(
    arguments: argparse.Namespace, config: config_lib.RunConfig | None
) -> settings.Slice:
    """Returns the slice asked for, or else the config's.

    Raises:
      errors.UserError: neither names one, or they disagree without `--allow_other_slice`.
    """
    given = getattr(arguments, "slice", None)
    if given is None and (config is None or config.slice == "cpu"):
        of_config = "" if config is None else f" ({arguments.config} is for a CPU)"
        raise errors.UserError(f"--slice is missing{of_config}, e.g. --slice=v5e:4x4")
    chosen = settings.parse_slice(given or config.slice)
    if config is not None and chosen.name != config.slice and not arguments.allow_other_slice:
        raise errors.UserError(
            f"--slice={chosen.name}, but {arguments.config} is written for {config.slice}; add"
            " --allow_other_slice if that is meant"
        )
    return chosen


def environment(arguments: argparse.Namespace, chosen: settings.Slice) -> dict[str, str]:
    """Returns the variables of a run.

    Raises:
      errors.UserError: one is malformed, or looks like a secret and would be printed.
    """
    flags = xla_flags.init_args(
        chosen.generation.chip, num_slices=chosen.num_slices, given=arguments.xla_flags
    )
    variables = {xla_flags.VARIABLE: flags}
    for item in arguments.env:
        match = _VARIABLE.fullmatch(item)
        if match is None:
            raise errors.UserError(f"--env={item} will not do; it takes NAME=VALUE")
        if _LOOKS_SECRET.search(match[1]):
            raise errors.UserError(
                f"--env={match[1]}=... looks like a secret, and commands are printed; store it with"
                f" 'gcloud secrets create NAME --data-file=-' and pass --secret={match[1]}=NAME"
            )
        variables[match[1]] = match[2]
    places = []
    for item in arguments.secret:
        match = _SECRET.fullmatch(item)
        if match is None:
            # Not repeated: it may be the value itself that was given.
            raise errors.UserError("--secret takes VARIABLE=NAME_OF_THE_SECRET, not its value")
        places.append(f"{match[1]}={arguments.project}/{match[2]}")
    if places:
        variables[worker.SECRETS_VARIABLE] = ",".join(places)
    return variables


def check_cloud(
    sh: shell.Shell,
    arguments: argparse.Namespace,
    *,
    workdir: str | None,
    accelerator: settings.Slice | None,
) -> None:
    """Asks Google Cloud, without changing anything, whether what is named there exists.

    Raises:
      errors.UserError: the project, the bucket, or the chips in this zone do not.
    """
    project = f"--project={arguments.project}"
    if workdir is not None:
        bucket = check_workdir(workdir)
        found = sh.read(
            "gcloud", "storage", "buckets", "describe", f"gs://{bucket}", project, "--format=json"
        )
        if not sh.is_dry:
            _check_bucket(bucket, found, arguments)
    if accelerator is None:
        return
    kind, zone = accelerator.accelerator_type, arguments.zone
    place = (f"--zone={zone}", project, "--format=json")
    found = sh.read("gcloud", "compute", "tpus", "accelerator-types", "describe", kind, *place)
    if found is None and not sh.is_dry:
        raise errors.UserError(
            f"Google Cloud has no {kind} ({accelerator.name}) in {zone} for {arguments.project}; see"
            f" 'gcloud compute tpus accelerator-types list --zone={zone} {project}'"
        )


def _check_bucket(bucket: str, found: dict | None, arguments: argparse.Namespace) -> None:
    region = settings.region(arguments.zone)
    if found is None:
        raise errors.UserError(
            f"there is no bucket gs://{bucket}; 'gcloud storage buckets create gs://{bucket}"
            f" --location={region} --project={arguments.project}' makes one beside the chips"
        )
    location = found.get("location", "").lower()
    if not region.startswith(location):  # "us" and "eu" are places, too
        shell.say(
            f"warning: gs://{bucket} is in {location}, the chips are in {region}: what goes between"
            " them is slow and billed"
        )
