"""Tokenised documents on disk: written once, memory-mapped by every run after that.

A cache is a directory:

    tokens.bin     all tokens, little-endian uint8, uint16 or uint32 (the smallest that holds the
                   vocabulary); every document ends with the tokenizer's eos, which is nowhere else
    offsets.bin    uint64 [num_documents + 1]: document d is tokens[offsets[d]:offsets[d + 1]]
    manifest.json  counts, checksums and provenance; written last

It is made under a temporary name beside its place and renamed when it is complete and on the disk,
so that whatever has the final name is whole. A lock lets one process write it; what an interrupted
one left behind is removed by the next one that holds the lock.
"""

from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any
from typing import BinaryIO
import uuid

import numpy as np

import llm_jax
from llm_jax import errors
from llm_jax.data import file_lock

FORMAT_VERSION = 1
TOKENS_FILE = "tokens.bin"
OFFSETS_FILE = "offsets.bin"
MANIFEST_FILE = "manifest.json"

_DTYPES = ("uint8", "uint16", "uint32")
_READ_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says. Counts of `num_bytes` are of UTF-8 text, without any eos."""

    format_version: int
    source: str
    split: str
    tokenizer: str  # the spec it was made from
    tokenizer_fingerprint: str  # sha256, hex
    vocab_size: int
    eos_id: int
    pad_id: int
    num_documents: int
    num_tokens: int  # with one eos for each document
    num_bytes: int
    dtype: str
    sha256: dict[str, str]  # of each data file
    llm_jax_version: str


@dataclasses.dataclass(frozen=True, eq=False)
class TokenCache:
    """An open cache: memory maps and counts."""

    path: pathlib.Path
    manifest: Manifest
    tokens: np.ndarray  # [num_tokens]
    offsets: np.ndarray  # [num_documents + 1], uint64

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @property
    def num_documents(self) -> int:
        return self.manifest.num_documents

    @property
    def num_bytes(self) -> int:
        return self.manifest.num_bytes

    @property
    def eos_id(self) -> int:
        return self.manifest.eos_id

    @property
    def pad_id(self) -> int:
        return self.manifest.pad_id

    def document(self, index: int) -> np.ndarray:
        """Returns the tokens of one document, its eos at the end."""
        return self.tokens[int(self.offsets[index]) : int(self.offsets[index + 1])]

    @classmethod
    def open(cls, path: str | os.PathLike, *, verify: bool = False) -> "TokenCache":
        """Opens a finished cache.

        Args:
          path: the cache's directory.
          verify: also read every byte and compare checksums.

        Raises:
          errors.UserError: there is no finished cache, or a file of it is damaged; names the file.
        """
        path = pathlib.Path(path)
        manifest = _read_manifest(path / MANIFEST_FILE)
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        sizes = {
            TOKENS_FILE: manifest.num_tokens * dtype.itemsize,
            OFFSETS_FILE: (manifest.num_documents + 1) * 8,
        }
        for name, size in sizes.items():
            _check_size(path / name, size)
            if verify:
                _check_sha256(path / name, manifest.sha256[name])
        # An empty file cannot be mapped; `write` makes none, so the manifest was tampered with.
        if manifest.num_tokens == 0:
            raise _damaged(path / MANIFEST_FILE, "it counts no tokens")
        return cls(
            path,
            manifest,
            np.memmap(path / TOKENS_FILE, dtype=dtype, mode="r"),
            np.memmap(path / OFFSETS_FILE, dtype="<u8", mode="r"),
        )


def write(
    path: str | os.PathLike,
    documents: Iterable[tuple[np.ndarray, int]],
    *,
    source: str,
    split: str,
    tokenizer: str,
    tokenizer_fingerprint: str,
    vocab_size: int,
    eos_id: int,
    pad_id: int,
) -> TokenCache:
    """Writes documents into a new cache at `path` and opens it; call it under `lock(path)`.

    Args:
      path: directory to make.
      documents: of each, its tokens (without eos) and the bytes of its text in UTF-8.
      source, split, tokenizer, tokenizer_fingerprint, vocab_size, eos_id, pad_id: for the manifest.

    Raises:
      errors.UserError: there are no documents, or `path` is on a disk that is full or read-only.
      ValueError: a document holds eos or a token outside of the vocabulary.
    """
    path = pathlib.Path(path)
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        writer = _Writer(temporary, vocab_size, eos_id)
        with writer:
            for tokens, num_bytes in documents:
                writer.add(tokens, num_bytes)
        if writer.num_documents == 0:
            raise errors.UserError(f"{source}, split {split!r}, has no text: there is no document")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            source=source,
            split=split,
            tokenizer=tokenizer,
            tokenizer_fingerprint=tokenizer_fingerprint,
            vocab_size=vocab_size,
            eos_id=eos_id,
            pad_id=pad_id,
            num_documents=writer.num_documents,
            num_tokens=writer.num_tokens,
            num_bytes=writer.num_bytes,
            dtype=writer.dtype.name,
            sha256=writer.sha256(),
            llm_jax_version=llm_jax.__version__,
        )
        text = json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"
        write_synced(temporary / MANIFEST_FILE, text.encode())
        _sync_directory(temporary)
        _rename(temporary, path)
    except OSError as error:
        raise errors.UserError(f"cannot write the token cache {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return TokenCache.open(path)


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


def write_synced(path: pathlib.Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _rename(temporary: pathlib.Path, path: pathlib.Path) -> None:
    try:
        os.rename(temporary, path)
    except OSError:
        # Somebody else's cache took the name, where the file system has no working lock. It is made
        # from the same key, hence of the same content, and whole, as it has this name.
        if not (path / MANIFEST_FILE).is_file():
            raise
    _sync_directory(path.parent)


class _Writer:
    """Appends documents to the two data files and keeps counts and checksums."""

    def __init__(self, directory: pathlib.Path, vocab_size: int, eos_id: int):
        self.dtype = np.dtype(next(d for d in _DTYPES if vocab_size <= np.iinfo(d).max + 1))
        self.num_documents = self.num_tokens = self.num_bytes = 0
        self._vocab_size = vocab_size
        self._eos_id = eos_id
        self._files: dict[str, BinaryIO] = {}
        self._hashes = {name: hashlib.sha256() for name in (TOKENS_FILE, OFFSETS_FILE)}
        for name in self._hashes:
            self._files[name] = open(directory / name, "wb", buffering=_READ_BYTES)
        self._append(OFFSETS_FILE, np.zeros(1, "<u8"))

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: Any) -> None:
        for file in self._files.values():
            with file:
                file.flush()
                os.fsync(file.fileno())

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self._vocab_size):
            raise ValueError(f"a token of {tokens} is outside of [0, {self._vocab_size})")
        if (tokens == self._eos_id).any():
            raise ValueError(f"document {self.num_documents} holds the eos token {self._eos_id}")
        with_eos = np.append(tokens, self._eos_id).astype(self.dtype.newbyteorder("<"))
        self.num_documents += 1
        self.num_tokens += len(with_eos)
        self.num_bytes += num_bytes
        self._append(TOKENS_FILE, with_eos)
        self._append(OFFSETS_FILE, np.array([self.num_tokens], "<u8"))

    def _append(self, name: str, array: np.ndarray) -> None:
        content = array.tobytes()
        self._files[name].write(content)
        self._hashes[name].update(content)

    def sha256(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}


def _sync_directory(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damaged(file: pathlib.Path, what: str) -> errors.UserError:
    return errors.UserError(
        f"{file}: {what}. Delete the directory {file.parent} and prepare the data again"
        " (python -m llm_jax.prepare --config=...)"
    )


def _read_manifest(file: pathlib.Path) -> Manifest:
    if not file.is_file():
        raise errors.UserError(
            f"{file} is missing: {file.parent} is not a finished token cache."
            " Prepare the data again (python -m llm_jax.prepare --config=...)"
        )
    try:
        raw = json.loads(file.read_bytes())
    except ValueError as error:
        raise _damaged(file, f"it is not JSON ({error})") from error
    names = {field.name for field in dataclasses.fields(Manifest)}
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise _damaged(file, f"format version {version!r}, this code reads {FORMAT_VERSION}")
    if set(raw) != names:
        raise _damaged(file, f"these keys are missing or unknown: {sorted(set(raw) ^ names)}")
    if raw["dtype"] not in _DTYPES:
        raise _damaged(file, f"dtype {raw['dtype']!r}, expected one of {', '.join(_DTYPES)}")
    return Manifest(**raw)


def _check_size(file: pathlib.Path, expected: int) -> None:
    if not file.is_file():
        raise _damaged(file, "the file is missing")
    size = file.stat().st_size
    if size != expected:
        raise _damaged(file, f"it has {size:,} bytes where the manifest says {expected:,}")


def _check_sha256(file: pathlib.Path, expected: str) -> None:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(_READ_BYTES):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise _damaged(file, "its checksum is not the manifest's: the content has changed")
