"""Commands of others: printed as they could be pasted, then run, and their errors told apart.

Standard output carries the commands (and what they print), nothing else: what `--dry-run` prints is a
script. What we have to say goes to standard error.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import datetime
import enum
import json
import shlex
import subprocess
import sys
import time
import types
from typing import Any

from llm_jax import errors


class Kind(enum.Enum):
    """What may be done about a command that failed."""

    PERMANENT = "no retry mends it"
    MISSING = "there is no such thing"
    EXISTS = "it is there already"
    TRANSIENT = "it may pass"


# Looked for in this order, in what a command said. Messages of the Cloud TPU API as users have
# reported them: a full zone and a quota that is used up have the same code and differ in words.
_SIGNS = (
    (Kind.TRANSIENT, ("per minute", "no more capacity", "resource_pool_exhausted", "stockout")),
    (Kind.EXISTS, ("already_exists", "already exists")),
    (
        Kind.PERMANENT,
        (
            "quota",
            "insufficient reserved capacity",
            "permission_denied",
            "does not have permission",
            "permission denied",
            "forbidden",
            "unauthenticated",
            "reauthentication",
            "gcloud auth login",
            "has not been used in project",
            "is disabled",
            "billing",
            "invalid_argument",
            "invalid value",
            "invalid choice",
            "unrecognized arguments",
            "ssh-add",
        ),
    ),
    (Kind.MISSING, ("not_found", "not found", "matched no objects", "does not exist")),
)

_GCLOUD_USAGE_ERROR = 2


def kind_of_failure(said: str, code: int = 1) -> Kind:
    """Returns what a failure calls for, by what the command or the API said."""
    lowered = said.lower()
    for kind, signs in _SIGNS:
        if any(sign in lowered for sign in signs):
            return kind
    return Kind.PERMANENT if code == _GCLOUD_USAGE_ERROR else Kind.TRANSIENT


class CommandError(errors.UserError):
    """A command failed; the message has the command's own last words."""

    def __init__(self, command: Sequence[str], code: int, said: str):
        self.kind = kind_of_failure(said, code)
        lines = [line.strip() for line in said.strip().splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), (lines or ["?"])[-1])
        super().__init__(f"'{' '.join(command[:4])} ...' ended with code {code}: {reason}")


@dataclasses.dataclass
class Shell:
    """Prints commands and, unless `is_dry`, runs them."""

    is_dry: bool = False
    sleep: Callable[[float], None] = time.sleep

    def run(self, *command: str, retries: int = 0) -> str:
        """Prints and runs a command; returns its standard output, or "" if dry.

        Args:
          retries: times to try again, with growing pauses, if the failure may pass.

        Raises:
          CommandError: it failed; `kind` says what that calls for.
        """
        print(shlex.join(command), flush=True)
        if self.is_dry:
            return ""
        for attempt in range(retries + 1):
            done = _run(command, capture=True)
            if done.returncode == 0:
                return done.stdout
            error = CommandError(command, done.returncode, done.stderr)
            if error.kind is not Kind.TRANSIENT or attempt == retries:
                raise error
            pause = min(10.0 * 2**attempt, 120.0)
            say(f"{error}; trying again in {pause:.0f} s ({attempt + 1} of {retries})")
            self.sleep(pause)
        raise AssertionError("unreachable")

    def call(self, module: types.ModuleType, *flags: str) -> None:
        """Prints the command that a module of ours is, and runs it in this process.

        Raises:
          errors.UserError: as the module.
        """
        print(shlex.join([sys.executable, "-m", module.__name__, *flags]), flush=True)
        if not self.is_dry:
            module.run(flags)

    def show(self, *command: str) -> None:
        """Prints and runs a command that speaks to the terminal itself. Raises as `run`."""
        print(shlex.join(command), flush=True)
        if self.is_dry:
            return
        done = _run(command, capture=False)
        if done.returncode:
            raise CommandError(command, done.returncode, "see above")

    def read(self, *command: str) -> Any:
        """Prints and runs a command that answers in JSON; returns None if what it asks for is not
        there, or if dry. Raises as `run`."""
        try:
            text = self.run(*command, retries=2)
        except CommandError as error:
            if error.kind is Kind.MISSING:
                return None
            raise
        return json.loads(text) if text.strip() else None


def _run(command: Sequence[str], capture: bool) -> subprocess.CompletedProcess:
    pipe = subprocess.PIPE if capture else None
    try:
        return subprocess.run(command, stdout=pipe, stderr=pipe, stdin=None, text=True)
    except FileNotFoundError:
        where = {
            "gcloud": "https://cloud.google.com/sdk/docs/install",
            "xpk": "pip install xpk",
            "kubectl": "gcloud components install kubectl",
        }.get(command[0], "put it on the PATH")
        raise errors.UserError(f"there is no '{command[0]}' on the PATH: {where}") from None


def say(line: str) -> None:
    """Prints a line for the reader, with the time, beside the commands."""
    now = datetime.datetime.now().strftime("%H:%M:%S")
    print(f"{now} {line}", file=sys.stderr, flush=True)


def confirm(question: str, is_yes: bool) -> None:
    """Asks before something is destroyed.

    Raises:
      errors.UserError: the answer is not yes, or there is nobody to ask.
    """
    if is_yes:
        return
    if not sys.stdin.isatty():
        raise errors.UserError(f"{question} There is no terminal to ask; add --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise errors.UserError("nothing was deleted")
