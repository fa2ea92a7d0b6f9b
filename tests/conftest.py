"""Eight CPU devices for every test, set before JAX starts."""

import os

# Tests compile much and compute little: without LLVM's optimisations they take half the time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
).strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

from llm_jax import config as config_lib  # noqa: E402
from llm_jax import mesh as mesh_lib  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Lets go of compiled programs after each file.

    Each holds some memory maps, of which Linux gives a process 65,530; without one left LLVM crashes.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def one_device():
    """A mesh of one device, entered."""
    mesh = mesh_lib.make(config_lib.MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh
