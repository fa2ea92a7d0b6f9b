"""Files of tensors: as the library reads and writes them; broken ones are told."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors import numpy as safetensors_numpy

from llm_jax import errors
from llm_jax.convert import tensors

ARRAYS = {
    "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.weight": np.array([[1.5], [-2.0]], ml_dtypes.bfloat16),
    "ids": np.arange(3),
    "mask": np.array([True, False, True]),
    "half": np.array([0.5, 1e-7], np.float16),
    "scalar": np.array(-1e4, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def _write(folder, max_bytes=10**9):
    infos = {name: tensors.TensorInfo(a.shape, a.dtype) for name, a in ARRAYS.items()}
    order = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    folder.mkdir()
    writer = tensors.Writer(folder, {n: infos[n] for n in order}, {"format": "pt"}, max_bytes)
    for name, array in ARRAYS.items():  # not in the order of the file
        writer.put(name, array)
    writer.close()


def test_what_the_library_writes_is_read(tmp_path):
    safetensors_numpy.save_file(ARRAYS, tmp_path / "model.safetensors", {"format": "pt"})
    read = tensors.Safetensors(tmp_path)
    assert read.metadata == {"format": "pt"}
    assert read.infos == {n: tensors.TensorInfo(a.shape, a.dtype) for n, a in ARRAYS.items()}
    for name, array in ARRAYS.items():
        assert read.read(name).tobytes() == array.tobytes()


def test_what_is_written_the_library_reads(tmp_path):
    _write(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    for name, array in safetensors_numpy.load_file(path).items():
        assert (array.dtype, array.shape) == (ARRAYS[name].dtype, ARRAYS[name].shape)
        assert array.tobytes() == ARRAYS[name].tobytes()
    safetensors_numpy.save_file(ARRAYS, tmp_path / "theirs", {"format": "pt"})
    assert path.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_that_was_not_promised_or_never_came_is_a_mistake(tmp_path):
    info = tensors.TensorInfo((2,), np.dtype(np.float32))
    writer = tensors.Writer(tmp_path, {"a": info, "b": info}, {}, 100)
    with pytest.raises(ValueError, match="a is float64"):
        writer.put("a", np.zeros(2))
    writer.put("b", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="^a never came"):
        writer.close()


def _refused(folder, match):
    with pytest.raises(errors.UserError, match=match) as caught:
        tensors.Safetensors(folder)
    assert "\n" not in str(caught.value)


def test_broken_files_are_told(tmp_path):
    _write(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    whole = path.read_bytes()
    for broken in (b"", whole[:6], whole[:40], b"\xff" * 64):
        path.write_bytes(broken)
        _refused(tmp_path / "model", "no safetensors file, or cut short")
    path.write_bytes(whole[:-1])
    _refused(tmp_path / "model", "header wants .*fetch it again")
    path.write_bytes(whole[:8] + b"[" + whole[9:])
    _refused(tmp_path / "model", "broken header")
    path.write_bytes(whole.replace(b'"BF16"', b'"F8_X"'))
    _refused(tmp_path / "model", "a.weight has dtype F8_X")
    path.write_bytes(whole.replace(b'"shape":[2,3]', b'"shape":[2,4]'))
    _refused(tmp_path / "model", "b.weight has 24 bytes, not those of float32.2,4.")


def test_shards_that_are_not_there_are_named(tmp_path):
    folder = tmp_path / "model"
    _write(folder, max_bytes=30)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    (folder / files[1]).unlink()
    (folder / files[2]).unlink()
    _refused(folder, f"lacks {files[1]}, {files[2]}, which")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weights": {}}))
    _refused(folder, "is no index of shards")
    (folder / "model.safetensors.index.json").unlink()
    _refused(folder, "neither model.safetensors nor")
    for name in files[3:]:
        (folder / name).unlink()
    _refused(folder, f"has {files[0]}, but neither")


def test_tensors_that_two_shards_hold_are_named(tmp_path):
    folder = tmp_path / "model"
    _write(folder, max_bytes=30)
    one, other, *_ = sorted(folder.glob("*.safetensors"))
    other.write_bytes(one.read_bytes())
    _refused(folder, f"ids is in {one.name} as well")


def test_pickles_are_never_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    import pickle

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    _refused(tmp_path, "pytorch_model.bin alone: pickles, which run code .*model.safetensors")
    assert not (tmp_path / "boom").exists()


def test_an_empty_folder_is_told(tmp_path):
    _refused(tmp_path, "no model.safetensors and no model.safetensors.index.json")
