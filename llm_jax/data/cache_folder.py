"""Directories of data files that are written once: whole or not there, with what they hold checked.

A cache is made under a temporary name beside its place and renamed when it is complete and on the
disk, so that whatever has the final name is whole. Its `manifest.json`, written last, has the counts,
checksums and provenance of its files. A lock lets one process write it; what an interrupted one left
behind is removed by the next one that holds the lock.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any
import uuid

import numpy as np

from llm_jax import errors
from llm_jax.data import file_lock

MANIFEST_FILE = "manifest.json"

_BLOCK_BYTES = 1 << 22


def exists(path: str | os.PathLike) -> bool:
    """Returns whether a cache, finished by construction, has this name."""
    return pathlib.Path(path).exists()


@contextlib.contextmanager
def lock(path: str | os.PathLike) -> Iterator[None]:
    """Holds the lock of the cache at `path`, waiting for it, and removes what others left behind.

    The lock is the kernel's (`flock`): it is gone with the process that held it. So whatever
    temporary directory is there once it is held belongs to nobody.
    """
    path = pathlib.Path(path)
    with file_lock.hold(path.parent / f".{path.name}.lock"):
        for stale in path.parent.glob(f".{path.name}.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        yield


@contextlib.contextmanager
def making(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary directory to fill, which takes the name `path` if nothing is raised.

    Raises:
      errors.UserError: the disk is full or read-only.
    """
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync_directory(temporary)
        _rename(temporary, path)
    except OSError as error:
        raise errors.UserError(f"cannot write the cache {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(directory: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of a directory that is complete but for it."""
    write_synced(directory / MANIFEST_FILE, (json.dumps(manifest, indent=2) + "\n").encode())


def write_synced(path: pathlib.Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class HashedFile:
    """A file that arrays are appended to, with its checksum; leaving it waits for the disk."""

    def __init__(self, path: pathlib.Path):
        self._file = open(path, "wb", buffering=_BLOCK_BYTES)
        self._hash = hashlib.sha256()

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *error: Any) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def append(self, array: np.ndarray) -> None:
        content = array.tobytes()
        self._file.write(content)
        self._hash.update(content)

    def sha256(self) -> str:
        return self._hash.hexdigest()


def _rename(temporary: pathlib.Path, path: pathlib.Path) -> None:
    try:
        os.rename(temporary, path)
    except OSError:
        # Somebody else's cache took the name, where the file system has no working lock. It is made
        # from the same key, hence of the same content, and whole, as it has this name.
        if not (path / MANIFEST_FILE).is_file():
            raise
    _sync_directory(path.parent)


def _sync_directory(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damaged(file: pathlib.Path, what: str) -> errors.UserError:
    """Returns the error that says what is wrong with a file of a cache."""
    return errors.UserError(
        f"{file}: {what}. Delete the directory {file.parent} and prepare the data again"
        " (python -m llm_jax.prepare --config=...)"
    )


def read_manifest(file: pathlib.Path, kind: str, version: int, names: set[str]) -> dict[str, Any]:
    """Returns what a manifest says.

    Args:
      file: the manifest.
      kind: of cache, for messages.
      version: that its `format_version` must be.
      names: of its keys, all of them.

    Raises:
      errors.UserError: there is none, or it is damaged.
    """
    if not file.is_file():
        raise errors.UserError(
            f"{file} is missing: {file.parent} is not a finished {kind} cache."
            " Prepare the data again (python -m llm_jax.prepare --config=...)"
        )
    try:
        raw = json.loads(file.read_bytes())
    except ValueError as error:
        raise damaged(file, f"it is not JSON ({error})") from error
    found = raw.get("format_version") if isinstance(raw, dict) else None
    if found != version:
        raise damaged(file, f"format version {found!r}, this code reads {version}")
    if set(raw) != names:
        raise damaged(file, f"these keys are missing or unknown: {sorted(set(raw) ^ names)}")
    return raw


def check_file(file: pathlib.Path, size: int, sha256: str | None) -> None:
    """Checks a file's size in bytes and, if it is given, its checksum.

    Raises:
      errors.UserError: they differ; names the file.
    """
    if not file.is_file():
        raise damaged(file, "the file is missing")
    found = file.stat().st_size
    if found != size:
        raise damaged(file, f"it has {found:,} bytes where the manifest says {size:,}")
    if sha256 is None:
        return
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(_BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise damaged(file, "its checksum is not the manifest's: the content has changed")
