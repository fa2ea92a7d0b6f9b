"""Keeps a run going until it has finished, over preemptions and crashes.

Each poll looks at three things, in this order, and then acts:

1. launch/finished.json in the workdir: a machine saw the last step saved. Nothing else counts as the
   end: a training that is told to stop ends with exit code 0 as well.
2. The queued resource and its machines. Gone, suspended or failed: deleted and asked for again, unless
   the reason is one that no retry mends.
3. launch/exits/ in the workdir, written by machines whose training ended; every few polls also each
   machine by ssh, for those that ended without a word.

What is retried is bounded by progress: `max_retries` starts in a row without a new checkpoint, with
growing pauses, and it gives up. The queue may be waited in for ever; waiting costs nothing.
"""

from collections.abc import Sequence
import dataclasses
import json
import re

from launch import job as job_lib
from launch import shell
from llm_jax import errors

_WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
_LEAVING = ("SUSPENDING", "DELETING")
_NODES_THAT_COME = ("CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING", "UNHIDING")
_NODES_THAT_RUN = ("READY",)

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 30.0, 1800.0
_USAGE_ERROR = 2  # of the training: a wrong config, a loss that is not finite
_MAX_UNREACHABLE = 3  # looks by ssh in a row that fail on a slice that is said to be there
_MAX_BLIND_POLLS = 60  # in a row in which Google Cloud does not answer: a network that is down


class GaveUp(errors.UserError):
    """What went wrong is nothing that trying again would mend, or was tried often enough."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How often to look, and how often to try."""

    poll_seconds: float
    check_every: int  # polls
    max_retries: int  # starts without a new checkpoint between them


def state_of(resource: dict | None) -> str | None:
    """Returns the state of a queued resource, "ACTIVE"; None if there is none."""
    if resource is None:
        return None
    return resource.get("state", {}).get("state", "STATE_UNSPECIFIED")


def failure_of(resource: dict | None) -> str:
    """Returns why a queued resource failed, in the words of the API; empty if it did not."""
    state = (resource or {}).get("state", {})
    return state.get("failedData", {}).get("error", {}).get("message", "")


class Watcher:
    """One run, watched to its end.

    Attributes:
      is_over: the run has finished, or there is nothing more to be done for it.
    """

    def __init__(
        self,
        sh: shell.Shell,
        job: job_lib.Job,
        create_command: Sequence[str],
        num_steps: int,
        limits: Limits,
        status_line: str,
    ):
        self.is_over = False
        self._sh, self._job, self._place = sh, job, job.place
        self._create_command, self._status_line = create_command, status_line
        self._num_steps, self._limits = num_steps, limits
        self._started_on: str | None = (
            None  # createTime of the resource that the run was started on
        )
        self._tries, self._newest_step = 0, -2  # below -1, that of an empty workdir
        self._num_polls, self._num_unreachable = 0, 0
        self._said = ""

    def run(self) -> int:
        """Watches until the run has finished or was stopped by hand; returns an exit code.

        Raises:
          GaveUp: it will not finish without a person.
        """
        if self._sh.is_dry:
            return self._dry_run()
        num_blind = 0
        while True:
            try:
                if self._poll():
                    break
                num_blind = 0
            except GaveUp:
                self.is_over = True
                raise
            except shell.CommandError as error:
                num_blind += 1
                if error.kind is not shell.Kind.TRANSIENT or num_blind > _MAX_BLIND_POLLS:
                    raise
                self._say(f"{error}; looking again")
            self._sh.sleep(self._limits.poll_seconds)
        self.is_over = True
        return 0

    def _dry_run(self) -> int:
        """Prints what a run without incidents takes."""
        self._place.describe(self._sh)
        self._sh.run(*self._create_command)
        self._job.start(self._sh)
        self._finished()
        return 0

    def _poll(self) -> bool:
        """Looks once and acts; returns whether the run is over."""
        self._num_polls += 1
        if self._finished():
            return True
        resource = self._place.describe(self._sh)
        state = state_of(resource)
        if state is None:
            self._create()
        elif state in _WAITING or state in _LEAVING:
            self._say(f"{self._place.name} is {state}: waiting")
        elif state == "SUSPENDED":
            self._recreate("it was taken away (SUSPENDED)")
        elif state == "FAILED":
            self._after_failure(failure_of(resource))
        elif state == "ACTIVE":
            return self._tend(resource)
        else:
            self._say(f"{self._place.name} is {state}, which is new to us: waiting")
        return False

    # --- the chips --------------------------------------------------------------------------------

    def _create(self) -> None:
        self._started_on = None
        self._say(f"there is no {self._place.name}: asking for it")
        try:
            self._sh.run(*self._create_command)
        except shell.CommandError as error:
            if error.kind is shell.Kind.EXISTS:
                return  # it appeared meanwhile; the next poll sees it
            if error.kind is not shell.Kind.TRANSIENT:
                raise GaveUp(f"{error}. No retry mends that") from error
            self._try_again(str(error))

    def _recreate(self, why: str) -> None:
        self._try_again(f"{why}: deleting it and asking again")
        self._place.delete(self._sh)
        self._create()

    def _after_failure(self, reason: str) -> None:
        kind = shell.kind_of_failure(reason)
        if kind in (shell.Kind.PERMANENT, shell.Kind.MISSING):
            raise GaveUp(f"{self._place.name} FAILED: {reason}. No retry mends that")
        self._recreate(f"it FAILED ({reason or 'no reason given'})")

    # --- the run ----------------------------------------------------------------------------------

    def _tend(self, resource: dict) -> bool:
        """Acts on a resource that is ACTIVE; returns whether the run is over."""
        states = {node.get("state", "?") for node in self._place.nodes(self._sh)}
        coming = states & set(_NODES_THAT_COME)
        lost = states - coming - set(_NODES_THAT_RUN)
        if lost:
            self._recreate(f"machines are {', '.join(sorted(lost))}")
            return False
        if coming:
            self._say(f"{self._place.name} is ACTIVE, but machines are {', '.join(sorted(coming))}")
            return False
        if self._started_on != resource["createTime"]:
            self._start("its machines are ready", resource)
            return False
        ended = self._ended()
        if not ended and self._num_polls % self._limits.check_every == 0:
            ended = self._look()
        return self._after_end(ended, resource) if ended else False

    def _start(self, why: str, resource: dict) -> None:
        self._started_on = None  # if it fails, the next poll starts it again
        self._say(f"{why}: starting the run on all of them")
        try:
            self._job.start(self._sh)
            self._started_on = resource["createTime"]
        except shell.CommandError as error:
            if error.kind is shell.Kind.PERMANENT:
                raise GaveUp(f"{error}. No retry mends that") from error
            self._try_again(f"the start failed ({error})")

    def _ended(self) -> list[dict]:
        """Returns what machines wrote whose training ended."""
        try:
            text = self._sh.run("gcloud", "storage", "cat", f"{self._job.exits}/*", retries=2)
        except shell.CommandError as error:
            if error.kind is shell.Kind.MISSING:
                return []
            raise
        return [json.loads(line) for line in text.splitlines() if line.strip()]

    def _look(self) -> list[dict]:
        """Asks each machine; returns those whose training is gone though nothing was written."""
        try:
            text = self._place.on_all(self._sh, self._status_line, retries=1)
        except shell.CommandError as error:
            self._num_unreachable += 1
            self._say(f"cannot look ({self._num_unreachable} of {_MAX_UNREACHABLE}): {error}")
            if self._num_unreachable >= _MAX_UNREACHABLE:
                self._num_unreachable = 0
                self._recreate("its machines do not answer")
            return []
        self._num_unreachable = 0
        machines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        silent = [machine for machine in machines if machine["state"] in ("dead", "absent")]
        stopped = [m for m in machines if m.get("outcome") == "stop_requested"]
        return stopped + [{"outcome": "failed", "code": m["state"], **m} for m in silent]

    def _after_end(self, ended: list[dict], resource: dict) -> bool:
        """Acts on machines whose training ended; returns whether the run is over."""
        outcomes = {record["outcome"] for record in ended}
        described = ", ".join(f"{record['host']}: {record['outcome']}" for record in ended[:4])
        if "stop_requested" in outcomes:
            shell.say(f"stopped by hand ({described}); 'run' or 'watch' goes on")
            return True
        if any(record["code"] == _USAGE_ERROR for record in ended):
            raise GaveUp(
                f"the training refuses to go on (exit code 2 on {described}): its config or its data"
                f" needs a person; 'logs' shows why, and so does {self._job.workdir}/launch/logs"
            )
        if outcomes == {"finished"} and all(r["step"] >= self._num_steps for r in ended):
            return False  # the marker is being written
        codes = sorted({str(record["code"]) for record in ended})
        self._try_again(f"the training ended early ({described}; codes {', '.join(codes)})")
        try:
            job_lib.stop(self._sh, self._place, is_final=False)  # those that wait for the others
        except shell.CommandError as error:
            self._say(f"could not end the rest ({error}); the next poll sees what is there")
            return False
        self._start("what was left of it was ended", resource)
        return False

    def _finished(self) -> bool:
        url = f"{self._job.workdir}/launch/finished.json"
        marker = self._sh.read("gcloud", "storage", "cat", url)
        if marker is None:
            return False
        if marker["step"] < self._num_steps:
            self._say(f"step {marker['step']} was the end once; now it is {self._num_steps}")
            return False
        shell.say(
            f"finished: step {marker['step']} of {self._num_steps} is saved in {self._job.workdir}"
        )
        return True

    # --- bounds -----------------------------------------------------------------------------------

    def _saved_step(self) -> int:
        """Returns the newest step in the workdir, by its name; -1 if there is none."""
        try:
            text = self._sh.run(
                "gcloud", "storage", "ls", f"{self._job.workdir}/checkpoints/", retries=2
            )
        except shell.CommandError as error:
            if error.kind is shell.Kind.MISSING:
                return -1
            raise
        return max(
            (int(step) for step in re.findall(r"/(\d+)/\s*$", text, re.MULTILINE)), default=-1
        )

    def _try_again(self, why: str) -> None:
        """Counts, says why and pauses; raises GaveUp if that was often enough."""
        step = self._saved_step()
        if step > self._newest_step:
            self._newest_step, self._tries = step, 0
        if self._tries >= self._limits.max_retries:
            raise GaveUp(
                f"{why}; and that was try {self._tries + 1} without a new checkpoint since"
                f" {f'step {step}' if step >= 0 else 'the start'} (--max_retries={self._limits.max_retries})"
            )
        pause = min(_FIRST_PAUSE_SECONDS * 2**self._tries, _LONGEST_PAUSE_SECONDS)
        self._tries += 1
        self._say(f"{why} (try {self._tries} of {self._limits.max_retries}, in {pause:.0f} s)")
        self._sh.sleep(pause)

    def _say(self, line: str) -> None:
        """Says a line that was not just said: waiting takes hours."""
        if line != self._said:
            shell.say(f"watch: {line}")
        self._said = line
