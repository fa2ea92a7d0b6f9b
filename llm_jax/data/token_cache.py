"""Tokenised documents on disk: written once, memory-mapped by every run after that.

A cache is a directory:

    tokens.bin     all tokens, little-endian uint8, uint16 or uint32 (the smallest that holds the
                   vocabulary); every document ends with the tokenizer's eos, which is nowhere else
    offsets.bin    uint64 [num_documents + 1]: document d is tokens[offsets[d]:offsets[d + 1]]
    manifest.json  counts, checksums and provenance; written last

How it comes to be whole, and what is checked, is in `cache_folder`.
"""

from collections.abc import Iterable
import contextlib
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

import llm_jax
from llm_jax import errors
from llm_jax.data import cache_folder

FORMAT_VERSION = 1
TOKENS_FILE = "tokens.bin"
OFFSETS_FILE = "offsets.bin"

_DTYPES = ("uint8", "uint16", "uint32")


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
        manifest = _read_manifest(path / cache_folder.MANIFEST_FILE)
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        sizes = {
            TOKENS_FILE: manifest.num_tokens * dtype.itemsize,
            OFFSETS_FILE: (manifest.num_documents + 1) * 8,
        }
        for name, size in sizes.items():
            cache_folder.check_file(path / name, size, manifest.sha256[name] if verify else None)
        # An empty file cannot be mapped; `write` makes none, so the manifest was tampered with.
        if manifest.num_tokens == 0:
            file = path / cache_folder.MANIFEST_FILE
            raise cache_folder.damaged(file, "it counts no tokens")
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
    """Writes documents into a new cache at `path` and opens it; call it under `cache_folder.lock(path)`.

    Args:
      path: directory to make.
      documents: of each, its tokens (without eos) and the bytes of its text in UTF-8.
      source, split, tokenizer, tokenizer_fingerprint, vocab_size, eos_id, pad_id: for the manifest.

    Raises:
      errors.UserError: there are no documents, or `path` is on a disk that is full or read-only.
      ValueError: a document holds eos or a token outside of the vocabulary.
    """
    path = pathlib.Path(path)
    with cache_folder.making(path) as directory:
        writer = _Writer(directory, vocab_size, eos_id)
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
        cache_folder.write_manifest(directory, dataclasses.asdict(manifest))
    return TokenCache.open(path)


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest unsigned type that holds the ids of a vocabulary."""
    return np.dtype(next(d for d in _DTYPES if vocab_size <= np.iinfo(d).max + 1))


class _Writer:
    """Appends documents to the two data files and keeps counts and checksums."""

    def __init__(self, directory: pathlib.Path, vocab_size: int, eos_id: int):
        self.dtype = smallest_dtype(vocab_size)
        self.num_documents = self.num_tokens = self.num_bytes = 0
        self._vocab_size = vocab_size
        self._eos_id = eos_id
        self._files = {
            name: cache_folder.HashedFile(directory / name) for name in (TOKENS_FILE, OFFSETS_FILE)
        }
        self._files[OFFSETS_FILE].append(np.zeros(1, "<u8"))

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: Any) -> None:
        with contextlib.ExitStack() as stack:
            for file in self._files.values():
                stack.push(file)

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self._vocab_size):
            raise ValueError(f"a token of {tokens} is outside of [0, {self._vocab_size})")
        if (tokens == self._eos_id).any():
            raise ValueError(f"document {self.num_documents} holds the eos token {self._eos_id}")
        with_eos = np.append(tokens, self._eos_id).astype(self.dtype.newbyteorder("<"))
        self.num_documents += 1
        self.num_tokens += len(with_eos)
        self.num_bytes += num_bytes
        self._files[TOKENS_FILE].append(with_eos)
        self._files[OFFSETS_FILE].append(np.array([self.num_tokens], "<u8"))

    def sha256(self) -> dict[str, str]:
        return {name: file.sha256() for name, file in self._files.items()}


def _read_manifest(file: pathlib.Path) -> Manifest:
    names = {field.name for field in dataclasses.fields(Manifest)}
    raw = cache_folder.read_manifest(file, "token", FORMAT_VERSION, names)
    if raw["dtype"] not in _DTYPES:
        expected = f"expected one of {', '.join(_DTYPES)}"
        raise cache_folder.damaged(file, f"dtype {raw['dtype']!r}, {expected}")
    return Manifest(**raw)
