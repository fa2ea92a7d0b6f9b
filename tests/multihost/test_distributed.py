"""Processes that meet by flags, SLURM or a TPU's environment, agree, and end together."""

import http.server
import io
import os
import pathlib
import subprocess
import sys
import threading
import time

from absl import flags
from jax._src.clusters import cloud_tpu_cluster
import pytest

from launch import local
from llm_jax import distributed
from llm_jax import errors
from llm_jax import peers

ROOT = pathlib.Path(__file__).parents[2]
WORKER = [sys.executable, "-m", "tests.multihost.worker"]


@pytest.fixture
def given():
    """Sets flags of a place; they are undefined again afterwards."""
    before = set(flags.FLAGS)
    distributed.define_flags()
    defined = set(flags.FLAGS) - before

    def give(**values):
        flags.FLAGS(["test", *(f"--{name}={value}" for name, value in values.items())])

    give()
    yield give
    for name in defined:
        delattr(flags.FLAGS, name)


@pytest.fixture
def outside(monkeypatch):
    """An environment that is of no cluster."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "GCE_METADATA")):
            monkeypatch.delenv(name)
    return monkeypatch


# --- where a process stands ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, parts",
    [
        ({"num_processes": 2}, ["--num_processes=2 without --coordinator_address", "all three"]),
        ({"coordinator_address": "a:1", "process_id": 0}, ["without --num_processes"]),
        ({"coordinator_address": "10.0.0.2"}, ["without --num_processes and --process_id"]),
        (
            {"coordinator_address": "10.0.0.2", "num_processes": 2, "process_id": 0},
            ["--coordinator_address=10.0.0.2 must be HOST:PORT"],
        ),
        (
            {"coordinator_address": "a:65536", "num_processes": 2, "process_id": 0},
            ["must be HOST:PORT"],
        ),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2},
            ["--process_id=2 must lie in [0, 2)"],
        ),
        (
            {"coordinator_address": "a:1", "num_processes": 0, "process_id": 0},
            ["--num_processes=0 must be at least 1"],
        ),
        ({"heartbeat_timeout": 1}, ["--heartbeat_timeout=1 must be at least 5 seconds"]),
    ],
)
def test_flags_that_do_not_fit_are_refused(given, values, parts):
    given(**values)
    with pytest.raises(errors.UserError) as caught:
        distributed.start()
    for part in parts:
        assert part in str(caught.value)
    assert not distributed.is_running()


def test_a_laptop_finds_nothing_and_starts_nothing(given, outside):
    assert distributed._from_environment() is None
    distributed.start()
    assert not distributed.is_running()
    assert distributed.gather("x") == ["x"] and distributed.agree(True)
    assert not distributed.agree(False) and not distributed.is_preempted(1)


def test_one_process_by_flags_is_a_process_like_any(given, outside):
    given(coordinator_address="10.9.9.9:1", num_processes=1, process_id=0)
    distributed.start()
    assert not distributed.is_running()


@pytest.fixture
def metadata(outside):
    """A server that answers as that of a TPU VM does, for the host of attributes set in a dict."""
    attributes = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            self.send_response(200 if name in attributes else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    outside.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    outside.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    yield attributes
    server.shutdown()
    thread.join()
    server.server_close()


def test_hosts_of_slices_on_gke_are_found(metadata, outside):
    metadata["tpu-env"] = ""
    outside.setenv("TPU_WORKER_HOSTNAMES", "host-a,host-b")
    outside.setenv("TPU_WORKER_ID", "1")
    place = distributed._from_environment()
    assert (place.process_id, place.num_processes) == (1, 2)
    outside.setenv("MEGASCALE_NUM_SLICES", "3")
    outside.setenv("MEGASCALE_SLICE_ID", "2")
    place = distributed._from_environment()
    assert (place.process_id, place.num_processes) == (5, 6)
    assert place.arguments == {"cluster_detection_method": "gketpu"}


def test_hosts_of_slices_on_tpu_vms_are_found(metadata):
    metadata |= {
        "agent-worker-number": "1",
        "worker-network-endpoints": "10.0.0.2,10.0.0.3",
        "tpu-env": "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'",
    }
    place = distributed._from_environment()
    assert (place.process_id, place.num_processes) == (3, 4)
    assert place.arguments == {"cluster_detection_method": "gcetpu"}


def test_a_single_tpu_host_on_gke_needs_no_metadata_server(metadata, outside, given):
    outside.setenv("GCE_METADATA_IP", "127.0.0.1:9")  # nothing is there
    outside.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    distributed.start()
    assert not distributed.is_running()


def test_a_single_tpu_vm_is_not_asked_for_anything(metadata, given):
    metadata |= {
        "agent-worker-number": "0",
        "worker-network-endpoints": "10.0.0.2",
        "tpu-env": "",
    }
    distributed.start()
    assert not distributed.is_running()


def test_a_metadata_server_that_does_not_answer_is_an_error(metadata, outside):
    outside.setenv("GCE_METADATA_IP", "127.0.0.1:9")
    with pytest.raises(errors.UserError, match="on a single host set TPU_SKIP_MDS_QUERY=1"):
        distributed._from_environment()


# --- real processes -----------------------------------------------------------------------------


def _environment(scenario: str, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {"SCENARIO": scenario, "PYTHONPATH": str(ROOT)} | changes


def _run(scenario: str, **changes: str) -> tuple[list[int], str, str]:
    """Returns the exit codes of two processes and what they printed."""
    out, err = io.StringIO(), io.StringIO()
    group = local.start(
        WORKER,
        num_processes=2,
        environment=_environment(scenario, **changes),
        stdout=out,
        stderr=err,
    )
    group.wait(grace=40)
    return [process.returncode for process in group.processes], out.getvalue(), err.getvalue()


def test_processes_agree_and_the_others_hear_why_one_failed(tmp_path):
    codes, out, err = _run("agreeing", FOLDER=str(tmp_path))
    assert codes == [peers.LOST_PEER, 1], err
    for index in range(2):
        assert f"[{index}] the sea of process 1 is not that of process 0 (colour 1 and" in out
        assert f"[{index}] the data of process 1 is not that of process 0" in out
        assert f"[{index}] --workdir={tmp_path}/{index} is not the same folder for all" in out
    assert out.count("\n") == 6, out  # and no greetings of Gloo's
    assert not list(tmp_path.glob(".shared-*"))
    assert "[1] process 1: KeyError: 'broken on purpose'" in err
    (line,) = [line for line in err.splitlines() if line.startswith("[0]")]
    assert line.startswith("[0] error: process 1 failed: KeyError: 'broken on purpose'; 2 fingers")


@pytest.mark.slow
def test_a_mistake_of_all_processes_is_told_by_each_and_is_no_loss():
    codes, _, err = _run("refusing")
    assert codes == [peers.USAGE_ERROR] * 2
    assert sorted(err.splitlines()) == [
        "[0] error: nobody likes this setting",
        "[1] process 1: error: nobody likes this setting",
    ]


@pytest.mark.slow
def test_a_slurm_job_is_joined_as_jax_finds_it():
    job = _environment(
        "done",
        SLURM_JOB_ID="7",
        JAX_COORDINATOR_PORT=str(local.free_port()),  # the job's own may be taken here
        SLURM_STEP_NODELIST="localhost",
        SLURM_NTASKS="2",
        JAX_PLATFORMS="cpu",
    )
    processes = [
        subprocess.Popen(
            WORKER,
            env=job | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    out = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], out
    assert ["0 of 2" in out[0], "1 of 2" in out[1]] == [True, True]


@pytest.mark.slow
def test_a_process_whose_others_never_come_says_so():
    """JAX aborts from C++ here: the words are those of the handler of that."""
    place = ["--coordinator_address=127.0.0.1:9", "--num_processes=2", "--process_id=1"]
    started = time.monotonic()
    done = subprocess.run(
        [*WORKER, *place],
        env=_environment("alone"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert time.monotonic() - started < 60
    assert done.returncode == peers.LOST_PEER
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "error: process 1 of 2 did not meet the others at 127.0.0.1:9 within 2 s"
    )
