"""The allocator's settings; flags and dtypes are seen through the commands' own tests."""

import functools
import os
import subprocess
import sys
import types

import pytest

from llm_jax import backend

_FAULTS_OF_A_STEP = """
import resource
from llm_jax import backend
print(backend.keep_freed_memory() if KEEP else "as it comes")
import jax
import jax.numpy as jnp

@jax.jit
def step(x):
    return x[:-1] + jax.lax.sort(jnp.sin(x))[1:]  # temporaries of 16 MB

x = jnp.ones(4_000_000)
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(x))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[4:]))  # the heap grows for some steps, until its holes fit
"""


def _run(is_kept: bool) -> tuple[str, int]:
    code = _FAULTS_OF_A_STEP.replace("KEEP", str(is_kept))
    done = subprocess.run(
        [sys.executable, "-c", code],
        # One device, as users have: several run their programs on threads of their own.
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "GLIBC_TUNABLES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    answer, num_faults = done.stdout.splitlines()
    return answer, int(num_faults)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_step_need_not_pay_for_pages_again():
    answer, num_faults = _run(True)
    assert answer == "True" and num_faults < 100
    assert _run(False)[1] > 1000  # the measure measures something


def test_where_there_may_be_an_accelerator_the_allocator_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert not backend.keep_freed_memory()


def test_devices_speak_where_no_platform_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(backend, "_ACCELERATOR_DEVICES", (f"{tmp_path}/accel*",))
    assert not backend._may_have_accelerator()
    (tmp_path / "accel0").touch()
    assert backend._may_have_accelerator()


@pytest.mark.parametrize(
    ("is_installed", "is_chosen", "has_device", "is_skipped"),
    [
        (True, False, False, True),
        (False, False, False, False),
        (True, True, False, False),
        (True, False, True, False),
    ],
)
def test_tpus_are_not_looked_for_where_only_their_compiler_is(
    monkeypatch, tmp_path, is_installed, is_chosen, has_device, is_skipped
):
    (tmp_path / "accel0").touch()
    devices = (f"{tmp_path}/accel{0 if has_device else 1}",)
    monkeypatch.setattr(backend, "_ACCELERATOR_DEVICES", devices)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _: is_installed or None)
    config = types.SimpleNamespace(jax_platforms="tpu" if is_chosen else None)
    config.update = functools.partial(setattr, config)
    monkeypatch.setattr(backend.jax, "config", config)
    assert backend.skip_absent_tpu() == is_skipped
    assert (config.jax_platforms == "cpu") == is_skipped


@pytest.mark.skipif(not backend.importlib.util.find_spec("libtpu"), reason="libtpu is optional")
def test_an_unused_compiler_for_tpus_is_silent():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from llm_jax import backend; backend.skip_absent_tpu();"
            "import jax; print(jax.default_backend())",
        ],
        env={name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("cpu\n", "")
