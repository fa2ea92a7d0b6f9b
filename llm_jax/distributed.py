"""Several processes as one program: how they meet, who they are and what they agree on.

On a pod each host runs the same command, and `jax.distributed` joins them: with what JAX finds on
TPU slices (one or several), under SLURM and under Open MPI, or as three flags say:

    python -m llm_jax.train ... --coordinator_address=HOST:PORT --num_processes=2 --process_id=0

A laptop and a single TPU host find nothing, and start nothing. `peers` has how processes watch over
each other and end together. Decisions that all must take alike (a checkpoint is damaged, a file is
missing) go through `gather`, which needs no device.
"""

import dataclasses
import json
import os
import signal
import sys
import time
import typing
from typing import Any
import uuid

from absl import flags
from etils import epath
import jax
from jax._src import clusters
from jax._src import distributed as jax_distributed  # its client is public nowhere; Orbax reads it
from jax._src.lib import _jax
from jax.experimental import multihost_utils
import numpy as np

from llm_jax import errors
from llm_jax import peers

# In JAX's own order. Kubernetes is left out: JAX would warn on every pod that is no cluster.
_CLUSTERS = (
    clusters.OmpiCluster,
    clusters.SlurmCluster,
    clusters.GkeTpuCluster,
    clusters.GceTpuCluster,
)
_MEETING_SECONDS = 300  # hosts of a slice boot within minutes of each other
_BACKSTOP_SECONDS = 30  # JAX's heartbeats wait this much longer than ours, which say more
_MIN_HEARTBEAT_TIMEOUT = 5
_GATHER = "llm_jax/gather"
_TOLD_TO_END = 128 + signal.SIGTERM

_watch: peers.Watch | None = None
_preemption: Any = None
_num_gathered = 0


# --- starting -----------------------------------------------------------------------------------


def define_flags() -> None:
    """Defines the flags of a command that may run as several processes.

    They are flags, not settings: they differ between processes or are needed before a config is
    read from a checkpoint, and no result follows from them.
    """
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, for all to meet at.")
    flags.DEFINE_integer("num_processes", None, "Processes of this run.")
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0 on.")
    flags.DEFINE_integer(
        "heartbeat_timeout", 100, "Seconds of silence after which a process counts as lost."
    )


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where this process stands, and how `jax.distributed.initialize` is to know."""

    process_id: int
    num_processes: int
    meeting: str  # where it meets the others, in words
    arguments: dict[str, Any]


def start() -> None:
    """Joins the processes of this run, if there are several; call it before JAX sees a device.

    Raises:
      errors.UserError: flags that say too little or contradict each other, or a port that is taken.
    """
    timeout = flags.FLAGS.heartbeat_timeout
    if timeout < _MIN_HEARTBEAT_TIMEOUT:
        raise errors.UserError(
            f"--heartbeat_timeout={timeout} must be at least {_MIN_HEARTBEAT_TIMEOUT} seconds"
        )
    place = _from_flags() or _from_environment()
    if place is not None and place.num_processes > 1:
        _join(place, timeout)


def _join(place: _Place, timeout: int) -> None:
    global _watch
    who = f"process {place.process_id} of {place.num_processes}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Orbax asks JAX's own preemption service from its threads, with the numbers of older steps:
    # that would confuse the answer. See `watch_preemption`.
    jax.config.update("jax_enable_preemption_service", False)
    peers.on_abort(lambda: _did_not_meet(who, place.meeting))
    try:
        jax.distributed.initialize(
            **place.arguments,
            initialization_timeout=_MEETING_SECONDS,
            heartbeat_timeout_seconds=timeout + _BACKSTOP_SECONDS,
        )
    except RuntimeError as error:
        raise errors.UserError(
            f"{who} cannot meet the others at {place.meeting} ({error}): the port may be taken;"
            " choose another"
        ) from error
    address = jax_distributed.global_state.coordinator_address
    _watch = peers.Watch(_client(), process_id(), num_processes(), address, timeout)
    _watch.start()
    signal.signal(signal.SIGTERM, _end_at_once)
    if jax.default_backend() == "cpu":
        _keep_stdout_clean()


def _keep_stdout_clean() -> None:
    """Keeps Gloo's greetings, which C++ prints, out of what a command prints for programs to read."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _did_not_meet(who: str, meeting: str) -> typing.NoReturn:
    peers.say(
        f"error: {who} did not meet the others at {meeting} within {_MEETING_SECONDS} s: check"
        " that all of them were started, with the same address and number of processes, and that"
        " this host can reach it"
    )
    os._exit(peers.LOST_PEER)


def _end_at_once(*_: Any) -> typing.NoReturn:
    raise SystemExit(_TOLD_TO_END)


def _from_flags() -> _Place | None:
    """Returns the place that the flags give: all three or none of them."""
    names = ("coordinator_address", "num_processes", "process_id")
    given = {name: flags.FLAGS[name].value for name in names}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(names):
        return None
    if missing:
        have = [f"--{name}={value}" for name, value in given.items() if value is not None]
        raise errors.UserError(
            f"{' and '.join(have)} without {' and '.join(missing)}: give all three, or none to"
            " have a TPU slice or a SLURM job found"
        )
    address, num_processes, process_id = given.values()
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise errors.UserError(
            f"--coordinator_address={address} must be HOST:PORT, such as 10.0.0.2:8476"
        )
    if num_processes < 1:
        raise errors.UserError(f"--num_processes={num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise errors.UserError(
            f"--process_id={process_id} must lie in [0, {num_processes}), as --num_processes="
            f"{num_processes}"
        )
    # JAX is not to look around: on a TPU it would ask the metadata server.
    return _Place(
        process_id, num_processes, address, given | {"cluster_detection_method": "deactivate"}
    )


def _from_environment() -> _Place | None:
    """Returns the place that JAX finds in a TPU slice or a job, or None outside of one."""
    try:
        kind = next((kind for kind in _CLUSTERS if kind.is_env_present()), None)
        if kind is None or _is_single_on_gke(kind):
            return None
        meeting = f"the address that JAX has from {kind.name}"
        arguments = {"cluster_detection_method": kind.name}
        return _Place(kind.get_process_id(), kind.get_process_count(), meeting, arguments)
    except OSError as error:  # the TPU's metadata server, asked over HTTP
        raise errors.UserError(
            f"the metadata server of this TPU does not answer ({error}): on a single host set"
            " TPU_SKIP_MDS_QUERY=1; on a slice of several give --coordinator_address,"
            " --num_processes and --process_id"
        ) from error


def _is_single_on_gke(kind: type[clusters.ClusterEnv]) -> bool:
    """Returns whether a single TPU host shows by its environment, without a metadata server.

    JAX would ask one for slices, which takes seconds where it has no answer and fails in a container
    that has none. On GKE they are in the environment.
    """
    is_gke = kind is clusters.GkeTpuCluster and not os.environ.get("MEGASCALE_NUM_SLICES")
    return is_gke and len(kind._get_worker_list_in_slice()) == 1


# --- who and how many ---------------------------------------------------------------------------


def process_id() -> int:
    """Returns which process this is, without a look at the devices."""
    return jax_distributed.global_state.process_id


def num_processes() -> int:
    """Returns how many processes run together, without a look at the devices."""
    return jax_distributed.global_state.num_processes


def is_main() -> bool:
    """Returns whether this process is the one that writes logs."""
    return process_id() == 0


def _client() -> Any:
    return jax_distributed.global_state.client


# --- agreeing -----------------------------------------------------------------------------------


def gather(value: Any) -> list[Any]:
    """Returns the `value` (of JSON) of each process, in their order; waits for all of them.

    Every process must call it, in the same order as other calls. It waits as long as all live: a
    process that is lost meanwhile ends the others (`peers`).
    """
    global _num_gathered
    if num_processes() == 1:
        return [value]
    _num_gathered += 1
    folder, pause = f"{_GATHER}/{_num_gathered}/", 0.01
    _client().key_value_set(f"{folder}{process_id():06}", json.dumps(value))
    while len(entries := _client().key_value_dir_get(folder)) < num_processes():
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    return [json.loads(text) for _, text in sorted(entries)]


def fetch(array: jax.Array) -> np.ndarray:
    """Returns all of an array, also where other processes hold some of it; then all must call it."""
    if array.is_fully_addressable:
        return jax.device_get(array)
    return multihost_utils.process_allgather(array, tiled=True)


def agree(holds: bool) -> bool:
    """Returns whether something holds for every process. All must call it."""
    return all(gather(holds))


def check_same(what: str, value: Any, advice: str) -> None:
    """Checks that a value is the same for every process. All must call it.

    Raises:
      errors.UserError: on all processes, if it is not; names the first that differs.
    """
    values = gather(value)
    for index, other in enumerate(values):
        if other != values[0]:
            raise errors.UserError(
                f"{what} of process {index} is not that of process 0 ({other} and {values[0]}):"
                f" {advice}"
            )


def check_shared(workdir: str) -> None:
    """Checks that all processes see the same folder. All must call it.

    Raises:
      errors.UserError: on all processes, if they do not; names those that see another.
    """
    if num_processes() == 1:
        return
    path = epath.Path(workdir) / gather(f".shared-{uuid.uuid4().hex}")[0]
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    gather("written")
    sees = gather(path.exists())
    if is_main():
        path.unlink()
    if not all(sees):
        blind = ", ".join(str(index) for index, is_seen in enumerate(sees) if not is_seen)
        raise errors.UserError(
            f"--workdir={workdir} is not the same folder for all processes ({blind} does not see"
            " what process 0 writes there): use gs://, or a disk that all hosts share"
        )


# --- ending -------------------------------------------------------------------------------------


def watch_preemption() -> None:
    """Makes SIGTERM a notice that `is_preempted` gives, instead of the end; once, if several run.

    It is JAX's service, which settles on a step that no process has passed, but an instance of our
    own: Orbax knows nothing of it.
    """
    global _preemption
    if _watch is not None and _preemption is None:
        _preemption = _jax.create_preemption_sync_manager()
        _preemption.initialize(_client())


def is_preempted(count: int) -> bool:
    """Returns, for the same `count` on all processes, whether to save and stop.

    Args:
      count: of calls so far, from 1 on. Not a step: a notice that comes before the first call makes
        all stop at count 1.
    """
    return _preemption is not None and _preemption.reached_sync_point(count)


def on_loss(describe: typing.Callable[[], str]) -> None:
    """Sets what a process says of the state of the run when another one is lost.

    Args:
      describe: called in another thread; returns a sentence: what is saved, and what to do.
    """
    if _watch is not None:
        _watch.describe = describe


def is_running() -> bool:
    """Returns whether `start` has joined several processes."""
    return _watch is not None


def fail(error: BaseException) -> typing.NoReturn:
    """Ends this process because of `error`, and tells the others why."""
    _watch.fail(error)


def finish() -> None:
    """Leaves the other processes when all of them have come to their end."""
    global _watch, _preemption
    if _watch is None:
        return
    gather("finished")
    _watch.stop()
    if _preemption is not None:
        _preemption.shutdown()
    jax.distributed.shutdown()
    _watch = _preemption = None
