"""Eight CPU devices for every test, set before JAX starts."""

import os
import pathlib
import sys

# Tests compile much and compute little: without LLVM's optimisations they take half the time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
).strip()
# What one test, process or run before has compiled is not compiled again, in commands neither.
_PROGRAMS = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "programs"
for _name, _value in {
    "JAX_COMPILATION_CACHE_DIR": _PROGRAMS,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
}.items():
    os.environ.setdefault(_name, str(_value))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import flags  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from llm_jax import backend  # noqa: E402
from llm_jax import command  # noqa: E402
from llm_jax import config as config_lib  # noqa: E402
from llm_jax import mesh as mesh_lib  # noqa: E402
from llm_jax.kernels import few_rows  # noqa: E402


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


@pytest.fixture
def float32_of_few_rows(monkeypatch):
    """Lets float32 go the way of bfloat16 products of few rows, where rounding hides no mistake."""
    if not backend.has_library_flags():
        pytest.skip("this jaxlib is older than the options of products of few rows")
    monkeypatch.setattr(few_rows, "_DTYPES", ("bfloat16", "float32"))


@pytest.fixture
def parse(monkeypatch):
    """Returns `argv -> RunConfig` in this process; flags are taken away again afterwards."""
    before = set(flags.FLAGS)
    command.define_config()

    def run(*argv):
        # ml_collections looks for overrides in sys.argv.
        monkeypatch.setattr(sys, "argv", ["command", *argv])
        command._parse_flags(sys.argv)
        return command.config_from_flags()

    yield run
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    command._none_overrides.clear()
