"""The allocator's settings; flags and dtypes are seen through the commands' own tests."""

import subprocess
import sys

import pytest

from llm_jax import backend

_FAULTS_OF_A_SECOND_STEP = """
import resource
import numpy as np
from llm_jax import backend

def step():
    # As a step does: large buffers, all freed at its end.
    buffers = [np.ones(size, np.float32) for size in (40_000_000, 10_000_000, 300_000)]
    return len(buffers)

print(backend.keep_freed_memory() if KEEP else "as it comes")
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _run(is_kept: bool, platforms: str) -> tuple[str, int]:
    code = _FAULTS_OF_A_SECOND_STEP.replace("KEEP", str(is_kept))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"JAX_PLATFORMS": platforms, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    answer, num_faults = done.stdout.splitlines()
    return answer, int(num_faults)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_the_second_step_pays_for_no_page_again():
    answer, num_faults = _run(True, "cpu")
    assert answer == "True" and num_faults < 10
    # 200 MB, in large pages where the system has them: the measure measures something.
    assert _run(False, "cpu")[1] > 50


def test_where_there_may_be_an_accelerator_the_allocator_stays_as_it_is():
    answer, num_faults = _run(True, "tpu,cpu")
    assert answer == "False" and num_faults > 50


def test_devices_speak_where_no_platform_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(backend, "_ACCELERATOR_DEVICES", (f"{tmp_path}/accel*",))
    assert not backend._may_have_accelerator()
    (tmp_path / "accel0").touch()
    assert backend._may_have_accelerator()
