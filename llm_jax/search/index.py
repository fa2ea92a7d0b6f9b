"""An index: documents, their vectors and what made them, in a folder; searched exactly.

    DIR/documents.jsonl   as they were given, one a line
    DIR/vectors.npy       float32 [M, D], memory-mapped
    DIR/index.json        what made the vectors, counts, a checksum; written last

Exact, as a product of a million vectors of 384 elements takes a fraction of a second, and an accelerator does it
in blocks. What finds neighbours approximately can be built of `vectors.npy`.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import errors
from llm_jax.search import embedder as embedder_lib

_VERSION = 1
_DOCUMENTS, _VECTORS, _MANIFEST = "documents.jsonl", "vectors.npy", "index.json"
_BLOCK = 1 << 16  # documents scored at a time


@dataclasses.dataclass(frozen=True)
class Hit:
    """A document that a query finds: its cosine, its number and what was given of it."""

    score: float
    number: int
    document: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Index:
    """An open index.

    Attributes:
      path: its folder.
      vectors_MD: of the documents.
      documents: as they were given.
      model: name of what made the vectors (`Embedder.name`).
      workdir, step, pooling, max_length: to load it again.
      field: of a document, that was embedded.
    """

    path: pathlib.Path
    vectors_MD: np.ndarray
    documents: list[dict[str, Any]]
    model: str
    workdir: str
    step: int
    pooling: str
    max_length: int
    field: str

    def embedder(self) -> embedder_lib.Embedder:
        """Returns what made the vectors; raises as `embedder.load`."""
        how = {"pooling": self.pooling, "max_length": self.max_length}
        return embedder_lib.load(self.workdir, self.step, **how)

    def search(self, queries_ND: np.ndarray, count: int) -> list[list[Hit]]:
        """Returns the documents with the highest cosines of each query, the best first.

        Raises:
          ValueError: vectors of another width.
        """
        if queries_ND.shape[1] != self.vectors_MD.shape[1]:
            widths = (
                f"{queries_ND.shape[1]} elements where the index has {self.vectors_MD.shape[1]}"
            )
            raise ValueError(f"queries have {widths}")
        count = min(count, len(self.documents))
        scores_NK = np.full((len(queries_ND), 0), -np.inf, np.float32)
        numbers_NK = np.zeros((len(queries_ND), 0), np.int64)
        for start in range(0, len(self.vectors_MD), _BLOCK):
            block_MD = np.asarray(self.vectors_MD[start : start + _BLOCK])
            found = _best(queries_ND, block_MD, min(count, len(block_MD)))
            scores_NK = np.concatenate([scores_NK, np.asarray(found[0])], axis=1)
            numbers_NK = np.concatenate([numbers_NK, start + np.asarray(found[1])], axis=1)
            # Of equal scores the first document comes first.
            order = np.argsort(-scores_NK, axis=1, kind="stable")[:, :count]
            scores_NK = np.take_along_axis(scores_NK, order, axis=1)
            numbers_NK = np.take_along_axis(numbers_NK, order, axis=1)
        return [
            [
                Hit(float(score), int(number), self.documents[number])
                for score, number in zip(scores, numbers, strict=True)
            ]
            for scores, numbers in zip(scores_NK, numbers_NK, strict=True)
        ]


def _best(queries_ND: np.ndarray, block_MD: np.ndarray, count: int) -> tuple[jax.Array, jax.Array]:
    scores_NM = jnp.einsum("ND,MD->NM", queries_ND, block_MD, precision="highest")
    return jax.lax.top_k(scores_NM, count)


def build(
    path: str | os.PathLike,
    embedder: embedder_lib.Embedder,
    documents: Sequence[dict[str, Any]],
    field: str,
) -> Index:
    """Embeds documents and writes an index, which is there whole or not at all.

    Raises:
      errors.UserError: there are no documents, one lacks the field, or the folder is not empty.
    """
    path = pathlib.Path(path).expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise errors.UserError(f"--index={path} is there already: name a folder that is to be made")
    texts = _texts(documents, field)
    vectors_MD = embedder(texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        lines = (json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        (temporary / _DOCUMENTS).write_text("".join(lines), encoding="utf-8")
        np.save(temporary / _VECTORS, vectors_MD)
        workdir, _, rest = embedder.name.rpartition("@")
        step, _, pooling = rest.partition(" ")
        manifest = {
            "version": _VERSION,
            "workdir": str(pathlib.Path(workdir).absolute()) if "://" not in workdir else workdir,
            "step": int(step),
            "pooling": pooling,
            "max_length": embedder.max_length,
            "model": embedder.name,
            "field": field,
            "shape": list(vectors_MD.shape),
            "sha256": {name: _sha256(temporary / name) for name in (_DOCUMENTS, _VECTORS)},
        }
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        temporary.chmod(0o755)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_index(path)


def _texts(documents: Sequence[dict[str, Any]], field: str) -> list[str]:
    if not documents:
        raise errors.UserError("there are no documents to index")
    for number, document in enumerate(documents, start=1):
        if not isinstance(document.get(field), str):
            hint = errors.nearest(field, document)
            raise errors.UserError(f"document {number} has no text {field!r}{hint}")
    return [document[field] for document in documents]


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_index(path: str | os.PathLike) -> Index:
    """Opens an index.

    Raises:
      errors.UserError: there is none, or it is damaged, or of another version.
    """
    path = pathlib.Path(path).expanduser().absolute()
    if not (path / _MANIFEST).is_file():
        raise errors.UserError(f"--index={path} has no {_MANIFEST}: make one by `index`")
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        version, sums = manifest.pop("version"), manifest.pop("sha256")
        shape = tuple(manifest.pop("shape"))
    except (ValueError, KeyError) as error:
        raise errors.UserError(f"{path / _MANIFEST} is damaged: {error!r}; index again") from error
    if version != _VERSION:
        raise errors.UserError(f"{path} has version {version}, this is {_VERSION}: index again")
    for name, wanted in sums.items():
        if not (path / name).is_file() or _sha256(path / name) != wanted:
            raise errors.UserError(f"{path / name} is not what was written: index again")
    vectors_MD = np.load(path / _VECTORS, mmap_mode="r")
    # Not by `splitlines`, which ends lines at marks that JSON leaves as they are.
    lines = (path / _DOCUMENTS).read_text(encoding="utf-8").split("\n")
    documents = [json.loads(line) for line in lines if line]
    if vectors_MD.shape != shape or len(documents) != shape[0]:
        raise errors.UserError(f"{path} has {len(documents)} documents for {shape}: index again")
    return Index(path, vectors_MD, documents, **manifest)
