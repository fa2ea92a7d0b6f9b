"""Model folders that tests change before they convert them."""

from collections.abc import Callable
from collections.abc import Mapping
import json
import pathlib
import shutil
from typing import Any

import numpy as np
from safetensors import numpy as safetensors_numpy

from llm_jax.convert import exporting
from llm_jax.convert import importing
from llm_jax.convert import source as source_lib
from tests.golden.hf import goldens

Arrays = dict[str, np.ndarray]


def copy(
    name: str,
    folder: pathlib.Path,
    change: Callable[[Arrays], Arrays] | None = None,
    **settings: Any,
) -> pathlib.Path:
    """Returns `folder` with a golden's files, its tensors changed and its settings replaced.

    A setting of None is taken out of config.json.
    """
    shutil.copytree(goldens.FOLDER / name, folder)
    (folder / "outputs.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text()) | settings
    config = {
        key: value for key, value in config.items() if key not in settings or value is not None
    }
    (folder / "config.json").write_text(json.dumps(config))
    if change is not None:
        path = folder / "model.safetensors"
        arrays = change(safetensors_numpy.load_file(path))
        safetensors_numpy.save_file(arrays, path, {"format": "pt"})
    return folder


def import_ids(folder: pathlib.Path, workdir: pathlib.Path, **options: Any) -> str:
    """Converts a folder without a tokenizer."""
    source = source_lib.open_folder(folder, has_tokenizer=False)
    options = importing.Options(has_tokenizer=False, **options)
    return importing.import_model(source, str(workdir), options)


def export(workdir: pathlib.Path, folder: pathlib.Path, **options: Any) -> pathlib.Path:
    """Exports the newest checkpoint; returns the folder."""
    exporting.export_model(str(workdir), folder, None, exporting.Options(**options))
    return folder


def arrays_of(folder: pathlib.Path) -> Arrays:
    """Returns all tensors of a folder, by the library."""
    found: Arrays = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors_numpy.load_file(path)
    return found


def assert_same(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Compares names, dtypes and bytes."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        assert actual[name].tobytes() == array.tobytes(), name


def config_of(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the content of a folder's config.json."""
    return json.loads((folder / "config.json").read_text())
