"""Folder -> workdir -> folder gives the same bytes; what came changed in spelling or dtype, too."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from llm_jax import checkpoint
from llm_jax import errors
from llm_jax import trees
from llm_jax.convert import engine
from llm_jax.convert import equality
from llm_jax.convert import families
from llm_jax.convert import importing
from llm_jax.convert import settings
from llm_jax.convert import source as source_lib
from llm_jax.models import build
from tests import helpers
from tests.convert import folders
from tests.golden.hf import goldens


def _meta(workdir) -> checkpoint.Meta:
    return checkpoint.read_latest(str(workdir), None, lambda _, meta: meta)


@pytest.mark.parametrize("name", goldens.NAMES)
def test_a_round_trip_gives_the_same_files(name, tmp_path):
    golden = goldens.FOLDER / name
    folders.import_ids(golden, tmp_path / "run")
    back = folders.export(tmp_path / "run", tmp_path / "back")
    ours, theirs = (f / "model.safetensors" for f in (back, golden))
    assert ours.read_bytes() == theirs.read_bytes()
    assert folders.config_of(back) == folders.config_of(golden)


def _as(dtype):
    return lambda arrays: {name: array.astype(dtype) for name, array in arrays.items()}


def _half_of_them(arrays):
    """Matrices in bfloat16, vectors in float32, as some publish them."""
    return {n: a.astype(ml_dtypes.bfloat16) if a.ndim > 1 else a for n, a in arrays.items()}


@pytest.mark.parametrize(
    "change, held",
    [
        (_as(ml_dtypes.bfloat16), "bfloat16"),
        (_as(np.float16), "float32"),
        (_half_of_them, "float32"),
    ],
)
def test_dtypes_come_back_and_are_held_exactly(change, held, tmp_path):
    folder = folders.copy("llama3", tmp_path / "model", change)
    folders.import_ids(folder, tmp_path / "run")
    assert _meta(tmp_path / "run").config.model.param_dtype == held
    back = folders.export(tmp_path / "run", tmp_path / "back")
    folders.assert_same(folders.arrays_of(back), folders.arrays_of(folder))


def test_dtypes_can_be_chosen(tmp_path):
    folder = folders.copy("llama3", tmp_path / "model", _as(ml_dtypes.bfloat16))
    folders.import_ids(folder, tmp_path / "run", param_dtype="float32")
    assert {info.dtype for info in _meta(tmp_path / "run").arrays.values()} == {"float32"}
    back = folders.export(tmp_path / "run", tmp_path / "back", dtype="float16")
    folders.assert_same(folders.arrays_of(back), _as(np.float16)(folders.arrays_of(folder)))
    assert folders.config_of(back)["dtype"] == "float16"


def test_wider_numbers_are_not_rounded_in_silence(tmp_path):
    folder = folders.copy("llama2", tmp_path / "model", _as(np.float64))
    with pytest.raises(errors.UserError, match="float64 tensors.*--param_dtype"):
        folders.import_ids(folder, tmp_path / "run")


def test_shards_are_read_and_written(tmp_path):
    golden = folders.copy("gpt2", tmp_path / "model")
    arrays = folders.arrays_of(golden)
    folders.import_ids(golden, tmp_path / "run")
    sharded = folders.export(tmp_path / "run", tmp_path / "sharded", max_shard_bytes=8000)
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    for name, file in index["weight_map"].items():
        assert name in safetensors_numpy.load_file(sharded / file)
    folders.assert_same(folders.arrays_of(sharded), arrays)
    folders.import_ids(sharded, tmp_path / "again")
    assert _meta(tmp_path / "again").fingerprints == _meta(tmp_path / "run").fingerprints


def _renamed(old: str, new: str):
    return lambda arrays: {name.replace(old, new): array for name, array in arrays.items()}


def _bare_llama(arrays):
    """A bare model has no head, and no `model.` before its names."""
    return {n.removeprefix("model."): a for n, a in arrays.items() if not n.startswith("lm_head")}


def _old_gpt2(arrays):
    """As on OpenAI's page: without `transformer.`, with masks, and the tied head once more."""
    masks = {f"h.{i}.attn.bias": np.tri(64, dtype=np.float32)[None, None] for i in range(2)}
    head = {"lm_head.weight": arrays["transformer.wte.weight"]}
    return _renamed("transformer.", "")(arrays) | masks | head


def _old_bert(arrays):
    arrays = _renamed("LayerNorm.bias", "LayerNorm.beta")(arrays)
    arrays = _renamed("LayerNorm.weight", "LayerNorm.gamma")(arrays)
    return arrays | {
        "bert.embeddings.position_ids": np.arange(64)[None],
        "cls.predictions.decoder.weight": arrays["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": arrays["cls.predictions.bias"],
    }


def _old_t5(arrays):
    names = ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    return arrays | {f"{name}.weight": arrays["shared.weight"] for name in names}


@pytest.mark.parametrize(
    "name, change, more",
    [
        ("gpt2", _old_gpt2, {}),
        ("bert", _old_bert, {"position_embedding_type": "absolute"}),
        ("t5_v1_0", _old_t5, {"scale_decoder_outputs": None}),
        ("llama2", _bare_llama, {"architectures": ["LlamaModel"]}),
    ],
)
def test_other_spellings_come_back(name, change, more, tmp_path):
    folder = folders.copy(name, tmp_path / "model", change, **more)
    folders.import_ids(folder, tmp_path / "run")
    back = folders.export(tmp_path / "run", tmp_path / "back")
    folders.assert_same(folders.arrays_of(back), folders.arrays_of(folder))
    assert folders.config_of(back) == folders.config_of(folder)


def test_what_nothing_reads_is_left_out(tmp_path):
    def with_frequencies(arrays):
        extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2) for i in range(2)}
        return arrays | extra

    folder = folders.copy("llama2", tmp_path / "model", with_frequencies)
    folders.import_ids(folder, tmp_path / "run")
    back = folders.export(tmp_path / "run", tmp_path / "back")
    folders.assert_same(folders.arrays_of(back), goldens_of("llama2"))


def goldens_of(name: str):
    return safetensors_numpy.load_file(goldens.FOLDER / name / "model.safetensors")


def test_names_of_classes_are_the_checkpoints_labels(tmp_path):
    names = {"2": "ugly", "0": "bad", "1": "good"}
    folder = folders.copy("bert_classifier", tmp_path / "model", id2label=names)
    folders.import_ids(folder, tmp_path / "run")
    assert _meta(tmp_path / "run").labels == ["bad", "good", "ugly"]
    back = folders.config_of(folders.export(tmp_path / "run", tmp_path / "back"))
    assert back["id2label"] == names and back["label2id"] == {"bad": 0, "good": 1, "ugly": 2}


# --- without a source ---------------------------------------------------------------------------

_FAMILIES = {
    "bert_classifier": "bert",
    "deepseek_v3_halves": "deepseek_v3",
    "deepseek_v3_yarn": "deepseek_v3",
    "gemma3": "gemma3_text",
    "llama2": "llama",
    "llama3": "llama",
    "llama_yarn": "llama",
    "qwen3_moe_every_second": "qwen3_moe",
    "deepseek_v2_experts": "deepseek_v2",
    "deepseek_v3_experts": "deepseek_v3",
    "t5_v1_0": "t5",
    "t5_v1_1": "t5",
}


@pytest.mark.parametrize("name", goldens.NAMES)
def test_a_config_of_ours_alone_describes_the_model(name):
    golden = goldens.load(name)
    family = families.BY_TYPE[_FAMILIES.get(name, name)]
    names = goldens_of(name)
    model = settings.to_ours(family.settings, golden.config, names, name)
    written = settings.to_theirs(family.settings, model, {}, names, name)
    assert settings.to_ours(family.settings, written, names, name) == model
    # What both files say, they say alike.
    for key in written.keys() & golden.config.keys():
        if golden.config[key] is not None:
            assert written[key] == golden.config[key], key


def test_a_run_of_ours_is_exported_by_the_family_that_fits(tmp_path):
    config = helpers.tiny_run_config(
        {"max_length": 64, "use_qkv_bias": True, "tie_embeddings": False, "dropout": 0.1}
    )
    mesh, rules = helpers.make_mesh()
    model = helpers.random_model(config.model, mesh, rules)
    checkpoint.save_params(str(tmp_path / "run"), config, {"kind": "bytes"}, trees.to_nested(model))
    folder = folders.export(tmp_path / "run", tmp_path / "model")
    assert folders.config_of(folder)["architectures"] == ["Qwen2ForCausalLM"]
    source = source_lib.open_folder(folder, has_tokenizer=False)
    conversion = importing.Conversion(source, importing.Options(has_tokenizer=False), mesh, rules)
    assert equality.is_same(conversion.model_config, dataclasses.replace(config.model, dropout=0.0))
    helpers.assert_equal(conversion.params(), trees.to_nested(model))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_latent_dim": None, "rope_interleave": True},
        {"rope_scaling": "yarn", "rope_scaling_factor": 4.0, "rope_attention_factor": 0.9}
        | {"attention_scale": 0.4},
        {"rope_scaling": "yarn", "rope_scaling_factor": 40.0, "rope_beta_fast": 16.0},
    ],
    ids=str,
)
def test_runs_with_latents_are_exported(changes, tmp_path):
    """Any scale of scores is one of their `mscale_all_dim`."""
    config = helpers.tiny_run_config(helpers.LATENTS | {"tie_embeddings": False} | changes)
    mesh, rules = helpers.make_mesh()
    model = helpers.random_model(config.model, mesh, rules)
    checkpoint.save_params(str(tmp_path / "run"), config, {"kind": "bytes"}, trees.to_nested(model))
    folder = folders.export(tmp_path / "run", tmp_path / "model", family="deepseek_v3")
    source = source_lib.open_folder(folder, has_tokenizer=False)
    conversion = importing.Conversion(source, importing.Options(has_tokenizer=False), mesh, rules)
    assert equality.is_same(conversion.model_config, config.model)
    helpers.assert_equal(conversion.params(), trees.to_nested(model))


# --- on a mesh ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3", "gpt2", "t5_v1_0", "deepseek_v2"])
def test_parameters_are_filled_on_any_mesh(name):
    source = source_lib.open_folder(goldens.FOLDER / name, has_tokenizer=False)
    options = importing.Options(has_tokenizer=False)
    mesh, rules = helpers.make_mesh((1, 4, 1, 1, 2), rules="fsdp_tp")
    params = importing.Conversion(source, options, mesh, rules).params()
    with jax.set_mesh(mesh):
        conversion = importing.Conversion(source, options, mesh, rules)
        abstract = build.abstract_model(conversion.model_config, rules)
    for filled, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(trees.to_nested(abstract))):
        assert filled.sharding.spec == wanted.sharding.spec
    one = importing.Conversion(source, options, *helpers.make_mesh()).params()
    helpers.assert_equal(params, one)
    # And read off it again.
    plan = engine.Plan(conversion.family, conversion.model_config, params)
    folders.assert_same({n: engine.theirs(plan, n) for n in plan.slots}, goldens_of(name))
