"""Through a workdir and back: the files that come out are those that went in; what is wrong is named."""

import json
import shutil

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from llm_jax import errors
from llm_jax.convert import exporting
from llm_jax.convert import importing
from llm_jax.convert import source as source_lib
from tests.golden.hf import goldens

OPTIONS = importing.Options(has_tokenizer=False)


def _imported(folder, workdir):
    return importing.import_model(
        source_lib.open_folder(folder, has_tokenizer=False), str(workdir), OPTIONS
    )


@pytest.mark.parametrize("name", goldens.NAMES)
def test_a_model_comes_back_as_it_was(tmp_path, name):
    golden = goldens.load(name)
    _imported(golden.folder, tmp_path / "workdir")
    export = tmp_path / "exported"
    exporting.export_model(str(tmp_path / "workdir"), export, None, exporting.Options())
    actual = safetensors_numpy.load_file(export / "model.safetensors")
    wanted = safetensors_numpy.load_file(golden.folder / "model.safetensors")
    assert actual.keys() == wanted.keys()
    for key, value in wanted.items():
        assert actual[key].dtype == value.dtype
        np.testing.assert_array_equal(actual[key].view(np.int32), value.view(np.int32), key)
    config = json.loads((export / "config.json").read_text())
    assert golden.config.items() <= config.items()


@pytest.fixture
def folder(tmp_path):
    """A copy of a golden whose files a test may change."""
    copy = tmp_path / "model"
    shutil.copytree(goldens.load("llama3").folder, copy)
    return copy


def _changed(folder, change) -> str:
    """Returns the error of an import after a change of its tensors."""
    tensors = safetensors_numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors_numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(errors.UserError) as caught:
        _imported(folder, folder.parent / "workdir")
    assert not (folder.parent / "workdir" / "checkpoints").exists()
    return str(caught.value)


def test_tensors_that_do_not_fit_are_all_named(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.extra"] = np.zeros(3, np.float32)
        tensors["model.norm.weight"] = np.zeros(5, np.float32)

    message = _changed(folder, change)
    for part in ("layers.1.mlp.up_proj.weight", "layers.0.extra", "model.norm.weight", "[5]"):
        assert part in message
    assert "\n" not in message


def test_a_pickle_is_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "outputs.safetensors").unlink()  # of the golden, not of the model
    with pytest.raises(errors.UserError, match="pytorch_model.bin alone: pickles"):
        _imported(folder, folder.parent / "workdir")


def test_an_unknown_model_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    with pytest.raises(errors.UserError, match="lama.*llama"):
        _imported(folder, folder.parent / "workdir")
