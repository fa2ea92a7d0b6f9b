"""A queued resource, and a run that is shipped to its machines: the commands of gcloud for both."""

import argparse
import dataclasses
import pathlib
import re
import shlex
import sys
import tempfile

from launch import code
from launch import settings
from launch import shell

QUEUED = ("gcloud", "compute", "tpus", "queued-resources")
HOME = "llm_jax_runs"  # in the home folder of each machine


@dataclasses.dataclass(frozen=True)
class Place:
    """A queued resource: its name, where it is, and how its machines are reached."""

    name: str
    project: str
    zone: str
    ssh: str = "external"

    @property
    def flags(self) -> tuple[str, str]:
        return (f"--zone={self.zone}", f"--project={self.project}")

    @property
    def ssh_flags(self) -> tuple[str, ...]:
        return {"external": (), "internal": ("--internal-ip",), "iap": ("--tunnel-through-iap",)}[
            self.ssh
        ]

    def describe(self, sh: shell.Shell) -> dict | None:
        """Returns the queued resource as the API has it, or None if there is none."""
        return sh.read(*QUEUED, "describe", self.name, *self.flags, "--format=json")

    def nodes(self, sh: shell.Shell) -> list[dict]:
        """Returns the TPU VMs of this resource, one for each slice, as the API has them."""
        listed = sh.read(
            "gcloud", "compute", "tpus", "tpu-vm", "list", *self.flags, "--format=json"
        )
        own = re.compile(rf".*/{re.escape(self.name)}(-\d+)?")
        return [node for node in listed or [] if own.fullmatch(node["name"])]

    def delete(self, sh: shell.Shell) -> None:
        """Deletes the resource and its machines, whatever their state; waits until they are gone."""
        sh.run(*QUEUED, "delete", self.name, *self.flags, "--force", "--quiet", retries=2)

    def on_all(self, sh: shell.Shell, line: str, retries: int = 4) -> str:
        """Runs a line of shell on every machine of every slice; returns what they print.

        Machines that are just there may not know the key of the user yet, hence the retries.
        """
        where = ("--node=all", "--worker=all", *self.ssh_flags)
        remote = f"--command={line}"
        return sh.run(*QUEUED, "ssh", self.name, *self.flags, *where, remote, retries=retries)


def create_command(place: Place, chosen: settings.Slice, options: argparse.Namespace) -> list[str]:
    """Returns the command that asks for the chips."""
    runtime = options.runtime_version or chosen.generation.runtime_version
    line = [*QUEUED, "create", place.name, *place.flags]
    line += [f"--accelerator-type={chosen.accelerator_type}", f"--runtime-version={runtime}"]
    if chosen.num_slices > 1:
        line += [f"--node-count={chosen.num_slices}", f"--node-prefix={place.name}"]
    else:
        line += [f"--node-id={place.name}"]
    line += ["--spot"] * options.spot + ["--reserved"] * options.reserved
    # What the machines may do is decided by the roles of their service account alone.
    line += ["--scopes=https://www.googleapis.com/auth/cloud-platform"]
    line += [f"--labels=llm-jax={place.name}"]
    for flag in ("service_account", "network", "subnetwork", "valid_until_duration"):
        value = getattr(options, flag)
        line += [f"--{flag.replace('_', '-')}={value}"] if value else []
    return line + ["--internal-ips"] * (options.ssh != "external")


@dataclasses.dataclass(frozen=True)
class Job:
    """A run as it is shipped: the same code and command each time that it is started again."""

    place: Place
    workdir: str
    variables: dict[str, str]
    train_arguments: tuple[str, ...]
    code_id: str
    extra: str
    before: str | None

    @property
    def archive(self) -> str:
        return f"{self.workdir}/launch/code-{self.code_id}.tar.gz"

    @property
    def exits(self) -> str:
        return f"{self.workdir}/launch/exits"

    def ship(self, sh: shell.Shell) -> None:
        """Puts the code beside the run's checkpoints: what a run was made with stays with it."""
        local = pathlib.Path(tempfile.gettempdir()) / f"llm_jax-{self.code_id}.tar.gz"
        sh.call(code, f"--output={local}", f"--extra={self.extra}")
        sh.run("gcloud", "storage", "cp", str(local), self.archive, retries=2)

    def unpack(self) -> str:
        """Returns the shell that fetches the code on a machine and enters its folder."""
        folder = f"{HOME}/{self.place.name}/code-{self.code_id}"
        archive = shlex.quote(self.archive)
        return (
            f"set -eo pipefail; mkdir -p {folder}; gcloud storage cat {archive} | tar -xz -C {folder};"
            f" cd {folder}"
        )

    def set_up(self, sh: shell.Shell) -> None:
        """Installs on all machines."""
        self.place.on_all(sh, f"{self.unpack()}; bash launch/worker.sh setup")

    def start(self, sh: shell.Shell) -> None:
        """Starts the training on all machines, where it does not run yet."""
        try:
            sh.run("gcloud", "storage", "rm", "--recursive", self.exits)
        except shell.CommandError as error:
            if error.kind is not shell.Kind.MISSING:  # nothing has ended yet
                raise
        settings_of_run = shlex.join(f"{name}={value}" for name, value in self.variables.items())
        before = f"{self.before}; " if self.before else ""
        words = ["start", self.place.name, f"--workdir={self.workdir}", "--", *self.train_arguments]
        line = f"{self.unpack()}; {before}env {settings_of_run} bash launch/worker.sh"
        print(self.place.on_all(sh, f"{line} {shlex.join(words)}"), end="", file=sys.stderr)


def newest_code(place: Place) -> str:
    """Returns the shell that enters the folder of the code that was started last on a machine."""
    return f'cd "$(ls -td {HOME}/{place.name}/code-*/ | head -n 1)"'


def stop(sh: shell.Shell, place: Place, is_final: bool) -> None:
    """Ends the training on all machines; it saves first.

    Args:
      is_final: whether `watch` is to leave it so.
    """
    again = "" if is_final else " --restart"
    line = f"{newest_code(place)} && bash launch/worker.sh stop {place.name}{again}"
    print(place.on_all(sh, line), end="", file=sys.stderr)


def status_line(place: Place) -> str:
    """Returns the shell that prints one line of JSON on the run of a machine."""
    absent = 'echo "{\\"host\\": \\"$(hostname)\\", \\"state\\": \\"absent\\"}"'
    return f"{{ {newest_code(place)} && bash launch/worker.sh status {place.name}; }} 2>/dev/null || {absent}"
