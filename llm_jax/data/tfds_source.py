"""Documents of a TFDS dataset. Importing this imports TensorFlow."""

from collections.abc import Iterator
from collections.abc import Sequence
import logging
import os
import pathlib
import re
from typing import Any

import numpy as np

from llm_jax import errors
from llm_jax.data import file_lock
from llm_jax.data import host_tensorflow

tf = host_tensorflow.load()

import tensorflow_datasets as tfds  # noqa: E402 (TensorFlow must have been told of devices first)

# Imported for what it does: it registers our builder with TFDS.
import llm_jax.data.builders.state_of_the_union.state_of_the_union_dataset_builder  # noqa: E402, F401

TEXT_FEATURE = "text"

_log = logging.getLogger(__name__)

# TFDS warns of a deprecated attribute that it reads itself, in PartialDecoding.
logging.getLogger("absl").addFilter(
    lambda record: "`FeatureConnector.dtype` is deprecated" not in record.getMessage()
)


def documents(name: str, split: str, cache_dir: str) -> Iterator[str]:
    """Yields the text of each example of a split, in the order it is stored in.

    Args:
      name: of the dataset, as `tfds.builder` takes it.
      split: a split's name; TFDS's slices (`train[:10%]`) will do as well.
      cache_dir: prepared datasets are in its folder `tfds`.

    Raises:
      errors.UserError: an unknown dataset, config or split, no single text feature, or a dataset
        that is not there and cannot be downloaded.
    """
    builder = prepared(name, cache_dir)
    _check_split(builder, split)
    feature = text_feature(builder)
    dataset = builder.as_dataset(
        split=split,
        shuffle_files=False,
        decoders=tfds.decode.PartialDecoding({feature: True}),
        # One file after the other: the order is then that of the files.
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    )
    for index, example in enumerate(dataset.as_numpy_iterator()):
        try:
            yield example[feature].decode("utf-8")
        except UnicodeDecodeError as error:
            raise errors.UserError(
                f"tfds:{name}, split {split!r}, example {index}: {feature!r} is not UTF-8: {error}"
            ) from error


def records(
    name: str, split: str, cache_dir: str, fields: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the examples of a split: where each is, and its fields, as JSON has values.

    Args as of `documents`, and the features that are wanted; raises as it does, and for a feature that
    the dataset does not have.
    """
    builder = prepared(name, cache_dir)
    _check_split(builder, split)
    _check_features(builder, fields)
    dataset = builder.as_dataset(
        split=split,
        shuffle_files=False,
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    )
    for index, example in enumerate(dataset.as_numpy_iterator()):
        place = f"tfds:{name}, split {split!r}, example {index}"
        try:
            yield place, {field: _as_json(example[field]) for field in fields}
        except UnicodeDecodeError as error:
            raise errors.UserError(f"{place} is not UTF-8: {error}") from error


def label_names(name: str, cache_dir: str, field: str) -> list[str] | None:
    """Returns the names of a feature's classes, of one or of a sequence; None if it is of no class."""
    builder = prepared(name, cache_dir)
    _check_features(builder, [field])
    feature = builder.info.features[field]
    while isinstance(feature, tfds.features.Sequence):
        feature = feature.feature
    return list(feature.names) if isinstance(feature, tfds.features.ClassLabel) else None


def _check_features(builder: tfds.core.DatasetBuilder, fields: Sequence[str]) -> None:
    features = builder.info.features
    known = list(features.keys()) if isinstance(features, tfds.features.FeaturesDict) else []
    for field in fields:
        if field not in known:
            hint = errors.nearest(field, known)
            raise errors.UserError(
                f"tfds:{builder.info.full_name} has no feature {field!r}: its features are"
                f" {', '.join(known) or 'not named'}{hint}"
            )


def _as_json(value: Any) -> Any:
    """Returns a value of `as_numpy_iterator` as JSON would have it."""
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return [_as_json(part) for part in value]
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value.item() if isinstance(value, np.generic) else value


def prepared(name: str, cache_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the builder of a dataset, built or downloaded into CACHE_DIR/tfds if need be."""
    data_dir = pathlib.Path(cache_dir).expanduser() / "tfds"
    builder = _builder(name, data_dir)
    if builder.is_prepared():
        return builder
    # Two runs that start together must not both build it: the slower one fails in TFDS.
    with file_lock.hold(data_dir / f".{builder.name}.lock"):
        builder = _builder(name, data_dir)
        if not builder.is_prepared():
            _download_and_prepare(builder, name, data_dir)
    return builder


def _builder(name: str, data_dir: pathlib.Path) -> tfds.core.DatasetBuilder:
    try:
        # An explicit data_dir, or TFDS looks in other places, some of them remote.
        return tfds.builder(name, data_dir=os.fspath(data_dir), try_gcs=False)
    except tfds.core.registered.DatasetNotFoundError as error:
        base = re.split(r"[/:]", name)[0]
        hint = errors.nearest(base, tfds.list_builders(with_community_datasets=False))
        raise errors.UserError(f"data.source: TFDS has no dataset {name!r}{hint}") from error
    except (ValueError, ImportError, AssertionError) as error:
        # Unknown configs and versions, and builders with needs of their own.
        raise errors.UserError(f"data.source: tfds:{name}: {_one_line(error)}") from error


def _download_and_prepare(
    builder: tfds.core.DatasetBuilder, name: str, data_dir: pathlib.Path
) -> None:
    _log.info("tfds:%s is not in %s yet: preparing it", name, data_dir)
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            file_format="tfrecord",
        )
    except (
        OSError,
        ValueError,
        RuntimeError,
        AssertionError,
        ImportError,
        tf.errors.OpError,
    ) as error:
        # What downloads (`requests` raises OSErrors), checksums and missing extras raise.
        raise errors.UserError(
            f"data.source: tfds:{name} is not prepared in {data_dir}, and preparing it failed"
            f" ({type(error).__name__}: {_one_line(error)}). Check the network, or copy a prepared"
            " dataset there"
        ) from error


def text_feature(builder: tfds.core.DatasetBuilder) -> str:
    """Returns `text` if the dataset has it, else its only string feature; UserError otherwise."""
    features = builder.info.features
    kinds = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    strings = [
        name
        for name, feature in kinds.items()
        if getattr(feature, "shape", None) == () and feature.np_dtype in (str, bytes, object)
    ]
    if TEXT_FEATURE in strings:
        return TEXT_FEATURE
    if len(strings) == 1:
        return strings[0]
    raise errors.UserError(
        f"data.source: tfds:{builder.info.full_name} has no feature {TEXT_FEATURE!r} and"
        f" {len(strings) or 'no'} string features, so its text is not known; features:"
        f" {', '.join(f'{name} ({type(kind).__name__})' for name, kind in kinds.items())}"
    )


def _check_split(builder: tfds.core.DatasetBuilder, split: str) -> None:
    splits = list(builder.info.splits)
    for part in split.split("+"):
        base = part.partition("[")[0].strip()
        if base not in splits:
            hint = errors.nearest(base, splits)
            raise errors.UserError(
                f"tfds:{builder.name} has no split {base!r}: its splits are"
                f" {', '.join(splits)}{hint}"
            )
    try:
        builder.info.splits[split]
    except (ValueError, KeyError, AssertionError) as error:
        raise errors.UserError(
            f"split {split!r} of tfds:{builder.name}: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
