"""A model as it came: settings, tensors and tokenizer, from a folder of Hugging Face's."""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

from llm_jax import errors
from llm_jax.convert import tensors as tensors_lib
from llm_jax.convert import tokenizer_files
from llm_jax.data import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class Source:
    """A model as it came.

    Attributes:
      path: of its folder or file.
      config: the content of its `config.json`.
      tensors: all of them.
      metadata: of the files of tensors.
      tokenizer: None where there is none.
      files: that are kept beside it, as `tokenizer_files.kept` gives them.
    """

    path: pathlib.Path
    config: Mapping[str, Any]
    tensors: tensors_lib.Tensors
    metadata: Mapping[str, str]
    tokenizer: tokenizer_lib.Tokenizer | None
    files: tokenizer_files.Files


def open_folder(folder: pathlib.Path, has_tokenizer: bool) -> Source:
    """Reads a model's folder, but for its tensors.

    Raises:
      errors.UserError: a file is missing or broken.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise errors.UserError(f"{folder} is no folder")
    if not path.is_file():
        raise errors.UserError(f"{folder} has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise errors.UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise errors.UserError(f"{path} is no JSON object")
    tensors = tensors_lib.Safetensors(folder)
    tokenizer = tokenizer_files.read(folder, config) if has_tokenizer else None
    files = tokenizer_files.kept(folder, tokenizer)
    return Source(folder, config, tensors, tensors.metadata, tokenizer, files)
