"""Documents of a `data.source`: TFDS datasets, text files and JSONL files.

    tfds:NAME[/config]   a TFDS dataset; its own splits
    text:GLOB            each file is a document
    jsonl:GLOB:field     each line is an object whose `field` is a document; .gz is unpacked
    jsonl:GLOB           the same, of examples, whose fields `data.input_fields` and `target_field` name

Where `data.eval_source` is given it is what `data.eval_split` reads, and all of `data.source` is the training
split. Otherwise text and JSONL files have no splits: `data.eval_fraction` of them is held out for
`data.eval_split`, the rest is `data.train_split`. Every k-th document is held out; with fewer than
10 documents it is the tail of each, cut at white space. Of examples it is always whole ones.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import glob
import gzip
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.data.builders import state_of_the_union

# With fewer documents than this, holding out whole ones would be too coarse.
FEW_DOCUMENTS = 10
# How far from the wanted place a document may be cut for the sake of white space.
_NEAR_CHARS = 1000


@dataclasses.dataclass(frozen=True)
class Source:
    """A parsed `data.source`."""

    kind: str  # tfds, text or jsonl
    name: str  # of the TFDS dataset, or the glob
    field: str = ""  # jsonl


def parse(spec: str) -> Source:
    """Parses a source spec; raises UserError if it is none."""
    kind, _, rest = spec.partition(":")
    if kind == "jsonl":
        pattern, _, field = rest.rpartition(":")
        if pattern and field:
            return Source(kind, pattern, field)
    elif kind in ("tfds", "text") and rest:
        return Source(kind, rest)
    hint = errors.nearest(kind, ("tfds", "text", "jsonl"))
    raise errors.UserError(
        f"data.source = {spec!r}: use tfds:NAME[/config], text:GLOB or jsonl:GLOB:field{hint}"
    )


def documents(data_config: config_lib.DataConfig, split: str) -> Iterator[str]:
    """Yields the documents of a split, in an order that is always the same; empty ones are skipped.

    Raises:
      errors.UserError: a dataset, split, file, line or encoding that will not do; at the first
        document, or where the bad file or line is reached.
    """
    spec, is_whole = _spec_of(data_config, split)
    source = parse(spec)
    if source.kind == "tfds":
        from llm_jax.data import tfds_source  # imports TensorFlow

        yield from filter(None, tfds_source.documents(source.name, split, data_config.cache_dir))
        return
    is_eval = _is_eval_split(data_config, split)
    read = _text_documents(source) if source.kind == "text" else _jsonl_documents(source)
    if is_whole:
        yield from filter(None, read)
        return
    yield from hold_out(filter(None, read), data_config.eval_fraction, is_eval)


def records(
    data_config: config_lib.DataConfig, split: str, fields: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the examples of a split, in an order that is always the same.

    Args:
      data_config: source, splits.
      split: which.
      fields: of each example, those that are wanted.

    Yields:
      Where the example is, for messages; its fields, as JSON has values.

    Raises as `documents`, and for an example without one of the fields.
    """
    spec, is_whole = _spec_of(data_config, split)
    kind, _, rest = spec.partition(":")
    if kind == "tfds":
        from llm_jax.data import tfds_source  # imports TensorFlow

        yield from tfds_source.records(rest, split, data_config.cache_dir, fields)
        return
    is_eval = _is_eval_split(data_config, split)
    lines = _jsonl_lines(Source(kind, rest))
    for index, (place, line) in enumerate(lines):
        if is_whole or _is_held_out(index, data_config.eval_fraction) == is_eval:
            record = _jsonl_record(line, fields, place)
            yield place, {field: record[field] for field in fields}


def objects(pattern: str, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the objects of JSONL files, whole: those of a glob, which have some fields.

    Raises:
      errors.UserError: no such file, or a line that is no object or lacks a field.
    """
    for place, line in _jsonl_lines(Source("jsonl", pattern)):
        yield _jsonl_record(line, fields, place)


def _spec_of(data_config: config_lib.DataConfig, split: str) -> tuple[str, bool]:
    """Returns the source of a split, and whether it is read whole."""
    is_apart = bool(data_config.eval_source)
    is_eval = is_apart and split == data_config.eval_split
    return (data_config.eval_source if is_eval else data_config.source), is_apart


def identity(data_config: config_lib.DataConfig, split: str) -> str:
    """Returns a string that changes when the documents of this split do; reads no documents.

    For files: their paths, sizes and modification times. For TFDS: the name, and the version where
    it is known.

    Raises:
      errors.UserError: a bad spec, an unknown split of files, or no files.
    """
    spec, is_whole = _spec_of(data_config, split)
    kind, _, rest = spec.partition(":")
    # Examples have a source without a field.
    is_of_examples = kind == "jsonl" and ":" not in rest
    source = Source(kind, rest) if is_of_examples else parse(spec)
    if source.kind == "tfds":
        is_ours = source.name == state_of_the_union.NAME
        version = state_of_the_union.VERSION if is_ours else ""
        return json.dumps([spec, split, version])
    is_eval = _is_eval_split(data_config, split)
    digest = hashlib.sha256()
    for path in files(source):
        stat = path.stat()
        digest.update(json.dumps([str(path), stat.st_size, stat.st_mtime_ns]).encode() + b"\n")
    # What is read whole does not depend on which split it is.
    held_out = ["whole"] if is_whole else [is_eval, data_config.eval_fraction]
    return json.dumps([spec, *held_out, digest.hexdigest()])


def files(source: Source) -> list[pathlib.Path]:
    """Returns the absolute paths that a source's glob matches, sorted; UserError if none does."""
    pattern = os.path.expanduser(source.name)
    matched = sorted(glob.glob(pattern, recursive=True))
    result = [pathlib.Path(path).absolute() for path in matched if os.path.isfile(path)]
    if not result:
        found = "matches only directories" if matched else "matches no file"
        raise errors.UserError(f"data.source: {source.kind}:{source.name} {found}")
    return result


def hold_out(documents: Iterable[str], fraction: float, is_eval: bool) -> Iterator[str]:
    """Yields one side of the split of documents into training and evaluation.

    Together the two sides are everything, and both have a document if any can be cut.

    Args:
      documents: none of them empty.
      fraction: of the documents (or, if they are few, of each document's characters) held out.
      is_eval: whether to yield what is held out, or the rest.
    """
    documents = iter(documents)
    first = list(itertools.islice(documents, FEW_DOCUMENTS))
    if len(first) < FEW_DOCUMENTS:
        for document in first:
            cut = _tail_start(document, fraction)
            part = document[cut:] if is_eval else document[:cut]
            if part:
                yield part
        return
    for index, document in enumerate(itertools.chain(first, documents)):
        if _is_held_out(index, fraction) == is_eval:
            yield document


def _is_held_out(index: int, fraction: float) -> bool:
    # True of index 0 and then whenever the count of held out documents falls behind.
    return int(index * fraction) != int((index - 1) * fraction) or index == 0


def _tail_start(document: str, fraction: float) -> int:
    """Returns where the tail begins: behind the white space nearest to the fraction, if any is."""
    last = len(document) - 1
    if last < 1:
        return 1
    wanted = min(max(round(len(document) * (1.0 - fraction)), 1), last)
    near = range(max(1, wanted - _NEAR_CHARS), min(last, wanted + _NEAR_CHARS) + 1)
    cuts = [cut for cut in near if document[cut - 1].isspace()]
    return min(cuts, key=lambda cut: abs(cut - wanted), default=wanted)


def _is_eval_split(data_config: config_lib.DataConfig, split: str) -> bool:
    train, evaluation = data_config.train_split, data_config.eval_split
    if train == evaluation:
        raise errors.UserError(
            f"data.train_split and data.eval_split are both {train!r}; {data_config.source} holds"
            " out documents for the second: give them different names"
        )
    if split not in (train, evaluation):
        hint = errors.nearest(split, (train, evaluation))
        raise errors.UserError(
            f"{data_config.source} has no split {split!r}: its splits are {train!r} and"
            f" {evaluation!r} (data.train_split, data.eval_split){hint}"
        )
    return split == evaluation


def _text_documents(source: Source) -> Iterator[str]:
    is_empty = True
    for path in files(source):
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise errors.UserError(f"data.source: cannot read {path}: {error}") from error
        except UnicodeDecodeError as error:
            raise errors.UserError(
                f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x};"
                f" convert it, or narrow the glob {source.name}"
            ) from error
        is_empty = is_empty and not text
        yield text
    if is_empty:
        raise errors.UserError(f"data.source: all files of text:{source.name} are empty")


def _jsonl_lines(source: Source) -> Iterator[tuple[str, bytes]]:
    """Yields the lines of all files that are not blank, and where each is."""
    for path in files(source):
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{path}:{number}", line
        except (OSError, EOFError) as error:  # gzip reports damage as either
            raise errors.UserError(f"data.source: cannot read {path}: {error}") from error


def _jsonl_documents(source: Source) -> Iterator[str]:
    is_empty = True
    for place, line in _jsonl_lines(source):
        text = _jsonl_record(line, [source.field], place)[source.field]
        if not isinstance(text, str):
            kind = type(text).__name__
            raise errors.UserError(f"{place}: field {source.field!r} is a {kind}, not a string")
        is_empty = is_empty and not text
        yield text
    if is_empty:
        raise errors.UserError(f"data.source: all documents of jsonl:{source.name} are empty")


def _jsonl_record(line: bytes, fields: Sequence[str], place: str) -> dict[str, Any]:
    """Returns the object of a line, which has the fields."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise errors.UserError(f"{place} is not UTF-8: {error.reason}") from error
    except ValueError as error:
        raise errors.UserError(
            f"{place} is not JSON: {error}; field {', '.join(map(repr, fields))}"
        ) from error
    if not isinstance(record, dict):
        raise errors.UserError(
            f"{place} is a {type(record).__name__}, not an object with the field"
            f" {', '.join(map(repr, fields))}"
        )
    for field in fields:
        if field not in record:
            hint = errors.nearest(field, record)
            raise errors.UserError(
                f"{place} has no field {field!r}: its fields are {', '.join(record)}{hint}"
            )
    return record
