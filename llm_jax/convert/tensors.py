"""Tensors in files, one at a time: safetensors, whole or in shards.

A safetensors file is the length of its header (8 bytes), the header (JSON: name -> dtype, shape, place)
and the bytes; https://huggingface.co/docs/safetensors has the format. It is read and written here because
the library's writer takes all tensors at once, and its reader maps files into memory, where nobody can say
how much a conversion takes. Tests hold both to the library.
"""

from collections.abc import Mapping
import dataclasses
import json
import math
import pathlib
import re
from typing import Any
from typing import BinaryIO
from typing import Protocol

import ml_dtypes
import numpy as np

from llm_jax import errors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAX_HEADER_BYTES = 100_000_000  # as in the library

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def dtype_of(name: str) -> np.dtype:
    """Returns the dtype of a name such as `bfloat16`."""
    return next(dtype for dtype in DTYPES.values() if dtype.name == name)


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name}[{','.join(map(str, self.shape))}]"


class Tensors(Protocol):
    """Tensors by name, read one at a time."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """All of them, without values."""

    def read(self, name: str) -> np.ndarray:
        """Returns one, in memory of its own."""


@dataclasses.dataclass(frozen=True)
class _Place:
    file: pathlib.Path
    offset: int
    info: TensorInfo


class Safetensors:
    """The tensors of a model's folder."""

    def __init__(self, folder: pathlib.Path):
        """Reads the headers.

        Raises:
          errors.UserError: the folder has no such files, lacks shards, or one is cut short or broken.
        """
        self._places: dict[str, _Place] = {}
        self.metadata: dict[str, str] = {}
        for file in _files(folder):
            places, metadata = _read_header(file)
            twice = sorted(places.keys() & self._places.keys())
            if twice:
                other = self._places[twice[0]].file.name
                raise errors.UserError(f"{file}: {', '.join(twice)} is in {other} as well")
            self._places |= places
            self.metadata |= metadata

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: place.info for name, place in self._places.items()}

    def read(self, name: str) -> np.ndarray:
        place = self._places[name]
        count = math.prod(place.info.shape)
        array = np.fromfile(place.file, place.info.dtype, count, offset=place.offset)
        if array.size != count:
            raise errors.UserError(f"{place.file} ends within tensor {name}: fetch it again")
        return array.reshape(place.info.shape)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the safetensors files of a folder."""
    index = folder / INDEX
    if index.is_file() and (folder / SINGLE).is_file():
        raise errors.UserError(f"{folder} has both {SINGLE} and {INDEX}: move one of them away")
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise errors.UserError(f"{index} is no index of shards: {error!r}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise errors.UserError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(others) == 1 and not re.search(r"-of-\d+\.", others[0]):
        return [folder / others[0]]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if others:
        raise errors.UserError(
            f"{folder} has {', '.join(others)}, but neither {SINGLE} nor {INDEX} to say which is meant"
        )
    if pickles:
        raise errors.UserError(
            f"{folder} has its weights in {', '.join(pickles)} alone: pickles, which run code when they"
            f" are read, so llm_jax never does. Get the model's {SINGLE}, or save it as such"
        )
    raise errors.UserError(f"{folder} has no {SINGLE} and no {INDEX}")


def _read_header(file: pathlib.Path) -> tuple[dict[str, _Place], dict[str, str]]:
    """Returns the places of a file's tensors, and the metadata."""
    num_bytes = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if num_bytes < 8 or not 2 <= length <= min(num_bytes - 8, _MAX_HEADER_BYTES):
            raise errors.UserError(f"{file} is no safetensors file, or cut short")
        raw = opened.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        places, ends = {}, [0]
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise errors.UserError(
                    f"{file}: {name} has dtype {entry['dtype']}; use one of {', '.join(DTYPES)}"
                )
            info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            if end - start != info.num_bytes:
                raise errors.UserError(
                    f"{file}: {name} has {end - start} bytes, not those of {info}"
                )
            places[name] = _Place(file, 8 + length + start, info)
            ends.append(end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, errors.UserError):
            raise
        raise errors.UserError(f"{file} has a broken header: {error!r}") from error
    if 8 + length + max(ends) != num_bytes:
        raise errors.UserError(
            f"{file} has {num_bytes:,} bytes and its header wants {8 + length + max(ends):,}: fetch it"
            " again"
        )
    return places, metadata


def split(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[dict[str, TensorInfo]]:
    """Returns the tensors of each shard, in their order; one alone may be larger than `max_bytes`."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.num_bytes
    return shards


class Writer:
    """Writes a model's tensors as they come, in any order."""

    def __init__(
        self,
        folder: pathlib.Path,
        infos: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        max_bytes: int,
        name: str = "model",
    ):
        """Makes files of the full size.

        Args:
          folder: where, an empty one.
          infos: of all tensors, in the order in which files have them.
          metadata: of the files.
          max_bytes: of a shard; what fits into one is a single file.
          name: that of the files begin with.
        """
        self._places: dict[str, _Place] = {}
        shards = split(infos, max_bytes)
        names = [
            f"{name}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
        ]
        names = names if len(shards) > 1 else [f"{name}.safetensors"]
        for file, shard in zip(names, shards):
            self._make_file(folder / file, shard, metadata)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(info.num_bytes for info in infos.values())},
                "weight_map": {name: file for file, shard in zip(names, shards) for name in shard},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _make_file(
        self, path: pathlib.Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        with path.open("wb") as file:
            _write_header(file, infos, metadata)
            offset = file.tell()
            for name, info in infos.items():
                self._places[name] = _Place(path, offset, info)
                offset += info.num_bytes
            file.truncate(offset)

    def put(self, name: str, array: np.ndarray) -> None:
        """Writes a tensor, once; it has to be of the shape and dtype that were promised."""
        place = self._places[name]
        if TensorInfo(array.shape, array.dtype) != place.info:
            raise ValueError(f"{name} is {array.dtype}{array.shape}, not {place.info}")
        with place.file.open("r+b") as file:
            file.seek(place.offset)
            np.ascontiguousarray(array).tofile(file)
        del self._places[name]

    def close(self) -> None:
        """Checks that every tensor has come."""
        if self._places:
            raise ValueError(f"{', '.join(self._places)} never came")


def _write_header(
    file: BinaryIO, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, info in infos.items():
        start, end = end, end + info.num_bytes
        header[name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # so that tensors are aligned
    file.write(len(raw).to_bytes(8, "little") + raw)
