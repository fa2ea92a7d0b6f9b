"""How the processes of one run watch over each other, and end together.

A process that waits in a collective for one that is gone waits for ever on a TPU. JAX's answer is to
abort, from C++, with a stack trace that knows nothing of checkpoints. So a thread in each process
gives signs of life through JAX's coordination service, and process 0 looks who has stopped:

- A process that is lost (killed, or its host is gone) ends the others with one line: which it was,
  what is saved and what to do, and exit code `LOST_PEER`. That takes the heartbeat timeout, and
  `_QUICK_BEATS` where a collective has failed at once (Gloo's do; a TPU's wait).
- A process that fails says why first, and the others repeat it.
- Process 0 takes the coordination service with it, and JAX aborts the others: within a second if it
  was killed, after its own heartbeat timeout if its host went silent. Their last words are in a
  handler of SIGABRT, behind JAX's own. (JAX has a hook for a callback; one in Python cannot be
  called, as jaxlib has no way to convert its argument.)

All of it takes at most the heartbeat timeout and a minute.
"""

from collections.abc import Callable
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
import typing
from typing import Any

from llm_jax import errors

# Exit code of a process whose run can simply be started again: EX_TEMPFAIL of sysexits.h.
LOST_PEER = 75
USAGE_ERROR = 2
FAILURE = 1

_BEAT_SECONDS = 1.0  # between signs of life; longer where there are many processes
_PROCESSES_PER_SECOND = 100  # signs of life that process 0 is to be bothered with
_QUICK_BEATS = 10  # missed ones that suffice once something has failed
_GRACE_SECONDS = 3.0  # for a process to end by the same error as the one that told of it
_DESCRIBE_SECONDS = 10.0  # for listing what is saved; a bucket may not answer
_CONNECT_SECONDS = 3.0
_POST_SECONDS = 3.0

# What JAX's client raises, by the status that it got.
_NO_ANSWER = (RuntimeError, ValueError)

_ALIVE, _NEWS = "llm_jax/alive", "llm_jax/news"

_kept: list[Any] = []  # ctypes callbacks, which nothing else keeps alive


def _print(text: str) -> None:
    # A pipe that nobody reads any more must not keep a process from its end.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def say(line: str) -> None:
    """Prints one line to stderr, whatever thread or state the process is in."""
    _print(" ".join(line.split()) + "\n")


def on_abort(handle: Callable[[], None]) -> None:
    """Calls `handle` when C++ aborts the process, before it dies; replaces what was set before.

    Python's own handlers run between bytecodes, and an aborting thread has none to come. A C
    handler may call Python here because abort() raises its signal in the thread that calls it, at a
    place where nothing was interrupted.
    """

    def handler(_: int) -> None:
        handle()

    callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    _kept[:] = [callback]
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(callback, ctypes.c_void_p))


def _within(seconds: float, act: Callable[[], Any]) -> None:
    """Calls `act`, and goes on without it after so long."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)


class Watch:
    """Signs of life of this process, and the eyes on those of the others.

    Attributes:
      describe: returns what is saved and what to do, for the line on a lost process.
    """

    def __init__(
        self, client: Any, process_id: int, num_processes: int, address: str, timeout: float
    ):
        """Args: client of JAX's coordination service at `address`; timeout in seconds."""
        self.describe: Callable[[], str] = lambda: "start all processes again"
        self._client, self._id, self._address = client, process_id, address
        self._others = [f"{index:06}" for index in range(num_processes) if index != process_id]
        self._timeout = timeout
        self._every = max(_BEAT_SECONDS, num_processes / _PROCESSES_PER_SECOND)
        self._seen = {name: ("", time.monotonic()) for name in self._others}
        self._silent: set[str] = set()
        self._stopping, self._ending = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="llm_jax peers", daemon=True)

    def start(self) -> None:
        """Begins to beat."""
        on_abort(self._aborted)
        self._thread.start()

    def stop(self) -> None:
        """Ends quietly: all processes are done."""
        self._stopping.set()
        self._thread.join()
        on_abort(lambda: None)

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        answered, beat = time.monotonic(), 0
        while not self._stopping.wait(self._every):
            beat += 1
            try:
                self._client.key_value_set(f"{_ALIVE}/{self._id:06}", str(beat), True)
                news = self._read(_NEWS)
                if self._id == 0:
                    news = self._with_losses(news)
                answered = time.monotonic()
            except _NO_ANSWER:  # the service does not answer, or only now and then
                if time.monotonic() - answered > self._timeout or not self._is_service_there():
                    self._end(self._without_service())
                continue
            self._heed(news)

    def _read(self, folder: str) -> dict[str, str]:
        entries = self._client.key_value_dir_get(folder + "/")
        return {key.removeprefix(folder + "/"): text for key, text in entries}

    def _post(self, kind: str, text: str) -> None:
        """Tells the others, if the service still answers; else they have lost process 0 anyway."""

        def post():
            with contextlib.suppress(*_NO_ANSWER):
                self._client.key_value_set(f"{_NEWS}/{kind}/{self._id:06}", text, True)

        _within(_POST_SECONDS, post)

    def _with_losses(self, news: dict[str, str]) -> dict[str, str]:
        """Adds to the news which processes have gone silent, if any has."""
        now = time.monotonic()
        for name, beat in self._read(_ALIVE).items():
            if name in self._seen and self._seen[name][0] != beat:
                self._seen[name] = beat, now
        is_troubled = any(name.startswith("trouble/") for name in news)
        limit = min(self._timeout, _QUICK_BEATS * self._every) if is_troubled else self._timeout
        has_left = {name.removeprefix("left/") for name in news if name.startswith("left/")}
        silent = {name for name, (_, since) in self._seen.items() if now - since > limit}
        self._silent = silent - has_left
        lost = ", ".join(str(int(name)) for name in sorted(self._silent))
        if not lost:
            return news
        names = f"process {lost} was" if len(self._silent) == 1 else f"processes {lost} were"
        lost = f"{names} lost: no sign of life for {limit:.0f} s"
        self._post("lost", lost)
        return news | {"lost/000000": lost}

    def _heed(self, news: dict[str, str]) -> None:
        lost = [text for name, text in news.items() if name.startswith("lost/")]
        if lost:
            self._end(lost[0])
        failed = {name: text for name, text in news.items() if name.startswith("failed/")}
        if failed and f"failed/{self._id:06}" not in failed:
            # An error of all processes (a bad setting, a loss that is NaN) is told by each itself.
            time.sleep(_GRACE_SECONDS)
            name, text = min(failed.items())
            self._end(f"process {int(name.removeprefix('failed/'))} failed: {text}")

    # --- ending -------------------------------------------------------------------------------

    def _end(self, reason: str) -> None:
        """Ends the process with one line, unless it is being ended already."""
        if not self._ending.acquire(blocking=False):
            return
        say(f"{self._prefix()}error: {reason}; {self._state()}")
        self._leave(LOST_PEER)

    def _prefix(self) -> str:
        return f"process {self._id}: " if self._id else ""

    def _state(self) -> str:
        said = ["what is saved could not be listed; start all processes again"]
        _within(_DESCRIBE_SECONDS, lambda: said.append(self.describe()))
        return said[-1]

    def _leave(self, code: int) -> typing.NoReturn:
        """Ends the process; process 0 last, as the others are aborted when it goes."""
        self._post("left", "")
        if self._id == 0:
            with contextlib.suppress(*_NO_ANSWER):  # being aborted, it has no client any more
                self._wait_for_others()
        _print("")
        os._exit(code)

    def _wait_for_others(self) -> None:
        deadline = time.monotonic() + 2 * self._every + _GRACE_SECONDS + _DESCRIBE_SECONDS
        while time.monotonic() < deadline:
            news = self._read(_NEWS)
            if all(f"left/{name}" in news or name in self._silent for name in self._others):
                return
            time.sleep(0.1)

    def fail(self, error: BaseException) -> typing.NoReturn:
        """Ends this process because of what its main thread raised, and tells the others."""
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        if isinstance(error, errors.UserError):
            self._take_the_end()
            say(f"{self._prefix()}error: {error}")
            self._fail(USAGE_ERROR, str(error))
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            self._take_the_end()
            code = error.code if isinstance(error, SystemExit) else 128 + signal.SIGINT
            is_number = isinstance(code, int)
            self._fail(code if is_number else FAILURE, f"it was told to end ({text})")
        # What a collective raises when a process is gone differs by platform and by version. So
        # whatever it is, first see whether all are there: the thread ends this process if not.
        self._post("trouble", text)
        time.sleep((_QUICK_BEATS + 2) * self._every)
        self._take_the_end()
        trace = "".join(traceback.format_exception(error))
        _print("".join(f"{self._prefix()}{line}\n" for line in trace.splitlines()))
        self._fail(FAILURE, text)

    def _take_the_end(self) -> None:
        """Makes this thread the one that ends the process; waits if another one is at it."""
        self._ending.acquire()

    def _fail(self, code: int, text: str) -> typing.NoReturn:
        self._post("failed", text)
        self._leave(code)

    def _aborted(self) -> None:
        """Runs in a thread that C++ is aborting; see `on_abort`."""
        reason = "the runtime has ended this process (see above)"
        self._end(reason if self._is_service_there() else self._without_service())
        time.sleep(60)  # the thread that is ending the process is given time

    def _is_service_there(self) -> bool:
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except OSError:
            return False
        return True

    def _without_service(self) -> str:
        return f"process 0 was lost: nothing answers at its address {self._address}"
