"""Tokenised examples on disk: written once, memory-mapped by every run after that.

A cache is a directory with two files a column (`input_0`, perhaps `input_1`, and `target`)

    COLUMN.bin           values of all examples, little-endian; the manifest has the type
    COLUMN.offsets.bin   uint64 [num_examples + 1]: example i has values[offsets[i]:offsets[i + 1]]

and a manifest with counts, checksums, provenance and the names of the labels. How it comes to be
whole, and what is checked, is in `cache_folder`.
"""

from collections.abc import Iterable
from collections.abc import Mapping
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


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says."""

    format_version: int
    source: str
    split: str
    objective: str
    fields: list[str]  # of the inputs, and of the target
    tokenizer: str  # the spec it was made from
    tokenizer_fingerprint: str  # sha256, hex
    eos_id: int
    pad_id: int
    labels: list[str] | None  # names of classes, by their number; None where there are none
    num_examples: int
    dtypes: dict[str, str]  # of each column
    num_values: dict[str, int]
    sha256: dict[str, str]  # of each file
    llm_jax_version: str


@dataclasses.dataclass(frozen=True, eq=False)
class Column:
    """Values of examples, which have any number each."""

    values: np.ndarray
    offsets: np.ndarray  # [num_examples + 1], uint64

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[int(self.offsets[index]) : int(self.offsets[index + 1])]

    @property
    def lengths(self) -> np.ndarray:
        """Values of each example, int64."""
        return np.diff(self.offsets.astype(np.int64))


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleCache:
    """An open cache: memory maps and counts."""

    path: pathlib.Path
    manifest: Manifest
    columns: dict[str, Column]

    @property
    def num_examples(self) -> int:
        return self.manifest.num_examples

    @property
    def eos_id(self) -> int:
        return self.manifest.eos_id

    @property
    def pad_id(self) -> int:
        return self.manifest.pad_id

    @property
    def inputs(self) -> list[Column]:
        """The columns of texts, one or two."""
        return [column for name, column in self.columns.items() if name != "target"]

    @property
    def target(self) -> Column:
        return self.columns["target"]

    @classmethod
    def open(cls, path: str | os.PathLike, *, verify: bool = False) -> "ExampleCache":
        """Opens a finished cache; `verify` also reads every byte and compares checksums.

        Raises:
          errors.UserError: there is no finished cache, or a file of it is damaged; names the file.
        """
        path = pathlib.Path(path)
        names = {field.name for field in dataclasses.fields(Manifest)}
        file = path / cache_folder.MANIFEST_FILE
        manifest = Manifest(**cache_folder.read_manifest(file, "example", FORMAT_VERSION, names))
        columns = {}
        for name, dtype in manifest.dtypes.items():
            kind = np.dtype(dtype).newbyteorder("<")
            wanted = {
                f"{name}.bin": (manifest.num_values[name], kind),
                f"{name}.offsets.bin": (manifest.num_examples + 1, np.dtype("<u8")),
            }
            arrays = []
            for file_name, (count, kind) in wanted.items():
                sha256 = manifest.sha256[file_name] if verify else None
                cache_folder.check_file(path / file_name, count * kind.itemsize, sha256)
                arrays.append(_mapped(path / file_name, count, kind))
            columns[name] = Column(*arrays)
        return cls(path, manifest, columns)


def _mapped(file: pathlib.Path, count: int, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(file, dtype=dtype, mode="r") if count else np.zeros(0, dtype)


def write(
    path: str | os.PathLike,
    examples: Iterable[Mapping[str, np.ndarray]],
    dtypes: Mapping[str, str],
    **provenance: Any,
) -> ExampleCache:
    """Writes examples into a new cache at `path` and opens it; call it under `cache_folder.lock(path)`.

    Args:
      path: directory to make.
      examples: of each, its values by column.
      dtypes: of each column.
      provenance: of the manifest's fields, those that cannot be counted.

    Raises:
      errors.UserError: there are no examples, or `path` is on a disk that is full or read-only.
    """
    path = pathlib.Path(path)
    num_values, num_examples = dict.fromkeys(dtypes, 0), 0
    with cache_folder.making(path) as directory:
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context(cache_folder.HashedFile(directory / name))
                for column in dtypes
                for name in (f"{column}.bin", f"{column}.offsets.bin")
            }
            for column in dtypes:
                files[f"{column}.offsets.bin"].append(np.zeros(1, "<u8"))
            for example in examples:
                num_examples += 1
                for column, dtype in dtypes.items():
                    values = example[column].astype(np.dtype(dtype).newbyteorder("<"))
                    num_values[column] += len(values)
                    files[f"{column}.bin"].append(values)
                    files[f"{column}.offsets.bin"].append(np.array([num_values[column]], "<u8"))
        if not num_examples:
            split, source = provenance["split"], provenance["source"]
            raise errors.UserError(f"{source}, split {split!r}, has no examples")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            num_examples=num_examples,
            dtypes=dict(dtypes),
            num_values=num_values,
            sha256={name: file.sha256() for name, file in files.items()},
            llm_jax_version=llm_jax.__version__,
            **provenance,
        )
        cache_folder.write_manifest(directory, dataclasses.asdict(manifest))
    return ExampleCache.open(path)
