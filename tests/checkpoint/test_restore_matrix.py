"""Every layout restores what every layout saved: the same bits, in its own places, the same next step."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax.data import file_lock
from tests import commands
from tests.checkpoint import layouts

ROOT = pathlib.Path(__file__).parents[2]
IN_PROCESS = [name for name, layout in layouts.LAYOUTS.items() if layout.num_processes == 1]

# Of the largest value of each array; 1.9e-6 was seen, in second moments.
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> pathlib.Path:
    """A folder that the processes of pytest-xdist have in common."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "restore_matrix"


def _run_processes(name: str, shared: pathlib.Path) -> None:
    """Lets a layout of several processes save, and restore what all others have saved."""
    layout = layouts.LAYOUTS[name]
    num_devices = int(np.prod(layout.shape)) // layout.num_processes
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [
        f"--xla_force_host_platform_device_count={num_devices}",
        "--xla_backend_optimization_level=0",
    ]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/checkpoint/worker.py"), address]
    arguments = [name, str(shared), str(shared / "results" / name), *IN_PROCESS]
    logs = [shared / f"{name}-{index}.log" for index in range(layout.num_processes)]
    processes = []
    try:
        for index, log in enumerate(logs):
            with log.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [*command, str(index), *arguments],
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * layout.num_processes, "\n".join(log.read_text() for log in logs)


def _saved(name: str, shared: pathlib.Path) -> layouts.Result:
    """Returns what a layout saved into `shared / name`; done once, whatever process asks first."""
    layout = layouts.LAYOUTS[name]
    path = shared / "results" / name / "saved"
    if layout.num_processes > 1:
        for source in IN_PROCESS:
            _saved(source, shared)
    with file_lock.hold(shared / f"{name}.lock"):
        is_tried = shared / f"{name}.tried"
        if not is_tried.exists():
            is_tried.touch()  # what fails is not tried again for each row of the table
            if layout.num_processes > 1:
                _run_processes(name, shared)
            else:
                layouts.save(name, shared / name).write(path)
    return layouts.read_result(path)


def _restored(target: str, source: str, parts: str, shared: pathlib.Path) -> layouts.Result:
    if target in IN_PROCESS:
        return layouts.restore(target, shared / source, parts)
    _saved(target, shared)  # and restored from all others
    return layouts.read_result(shared / "results" / target / f"{source}-{parts}")


def _bits(arrays: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {path: (x.dtype.name, x.shape, x.tobytes()) for path, x in arrays.items()}


def _assert_same_step(stepped: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(stepped) == set(expected)
    for path, wanted in expected.items():
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(
            stepped[path], wanted, rtol=0, atol=TOLERANCE * scale, err_msg=path
        )


@pytest.mark.parametrize("parts", layouts.PARTS)
@pytest.mark.parametrize("target", layouts.LAYOUTS)
@pytest.mark.parametrize("source", layouts.LAYOUTS)
def test_any_layout_restores_what_any_layout_saved(shared, source, target, parts):
    saved = _saved(source, shared)
    expected = saved.arrays
    if parts == "params":
        expected = {
            path.removeprefix("model/"): value
            for path, value in expected.items()
            if path.startswith("model/")
        }
    restored = _restored(target, source, parts, shared)
    assert _bits(restored.arrays) == _bits(expected)
    assert restored.misplaced == []
    if parts == "full":
        assert restored.stepped["step"] == saved.arrays["step"] + 1
        assert not np.array_equal(
            restored.stepped["model/embedding/table_VD"],
            restored.arrays["model/embedding/table_VD"],
        )
        _assert_same_step(restored.stepped, saved.stepped)


@pytest.mark.parametrize("source", layouts.LAYOUTS)
def test_a_checkpoint_says_what_layout_saved_it(shared, source):
    _saved(source, shared)
    meta = checkpoint.read_meta(checkpoint.directory(str(shared / source)) / "1")
    assert tuple(meta.mesh.values()) == layouts.LAYOUTS[source].shape
    table = ("tensor", "data") if layouts.LAYOUTS[source].rules == "fsdp_tp" else (None, "data")
    assert meta.arrays["params/embedding/table_VD"].spec == table


def test_a_machine_with_one_device_reads_them_all(shared, tmp_path):
    for name in layouts.LAYOUTS:
        _saved(name, shared)
    argvs = [["inspect", str(shared / name), "--verify"] for name in layouts.LAYOUTS]
    for code, out, err in commands.run("llm_jax.checkpoint.__main__", tmp_path, argvs):
        assert (code, err) == (0, ""), out + err
        assert "yes: all 37 arrays are what was saved" in out
