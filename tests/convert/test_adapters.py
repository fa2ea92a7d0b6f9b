"""Updates as PEFT has them say what merging them says; with torch and peft installed, peft itself says so."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import trees
from llm_jax.convert import adapters
from llm_jax.convert import exporting
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.models import lora
from tests import helpers

MODELS = {
    "llama": ({"tie_embeddings": False}, "llama", "*"),
    "gpt2": (helpers.GPT2, "gpt2", "attention/q,attention/v,*/out"),  # of c_attn the keys have none
    "bert": (
        helpers.BERT | {"head": "sequence", "use_pooler": True, "use_head_transform": False},
        "bert",
        "*",
    ),
    "t5": (
        helpers.T5 | {"activation": "relu", "is_gated": False, "num_decoder_layers": 2},
        "t5",
        "*",
    ),
}


def _workdir(folder, model, targets, tune=None):
    model = helpers.tiny_model_config(
        **model, lora=config_lib.LoraConfig(rank=2, alpha=3.0, targets=targets)
    )
    data = config_lib.DataConfig(sequence_length=16)
    objective = config_lib.ObjectiveConfig(target_length=16)
    tune = tune or config_lib.TuneConfig()
    config = config_lib.RunConfig(model=model, data=data, objective=objective, tune=tune)
    config_lib.check(config)
    mesh, rules = exporting.one_device()
    params = helpers.random_model(config.model, mesh, rules)
    workdir = str(folder / "run")
    labels = ["a", "b"] if model.head == "sequence" else None
    tokenizer = tokenizer_lib.load("bytes").to_dict()
    checkpoint.save_params(workdir, config, tokenizer, trees.to_nested(params), labels=labels)
    return workdir


def _export(folder, workdir, family):
    """Writes `adapter`, and as models of theirs what it updates, `base_hf`, and the sum of both, `hf`."""
    adapters.export_adapter(workdir, folder / "adapter", None, family)
    adapters.merge(workdir, str(folder / "merged"), None)
    options = exporting.Options(family)
    exporting.export_model(str(folder / "merged"), folder / "hf", None, options)
    exporting.export_model(_base(folder, workdir), folder / "base_hf", None, options)


def _tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_matrices_and_updates_are_the_merged_matrices(tmp_path, name):
    settings, family, targets = MODELS[name]
    workdir = _workdir(tmp_path, settings, targets)
    _export(tmp_path, workdir, family)
    merged, base = _tensors(tmp_path / "hf"), _tensors(tmp_path / "base_hf")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    updates = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    changed = set()
    for key in [key for key in updates if key.endswith("lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = updates[key], updates[key.replace("lora_A", "lora_B")]
        rank = config["rank_pattern"].get(module, config["r"])
        alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
        assert a.shape[0] == b.shape[1] == rank
        is_target = any(module == t or module.endswith(f".{t}") for t in config["target_modules"])
        assert is_target
        update = alpha / rank * (b @ a)
        update = update.T if config["fan_in_fan_out"] else update
        name = f"{module}.weight"
        np.testing.assert_allclose(merged[name], base[name] + update, rtol=1e-5, atol=1e-6)
        changed.add(name)
    for name, array in base.items():
        assert np.array_equal(array, merged[name]) == (name not in changed), name
        module = name.removesuffix(".weight")
        is_target = any(module == t or module.endswith(f".{t}") for t in config["target_modules"])
        assert is_target == (name in changed)
    if settings.get("head") == "sequence":
        saved = {"base_model.model.classifier.weight", "base_model.model.bert.pooler.dense.bias"}
        assert saved <= updates.keys()
        assert config["modules_to_save"] == ["bert.pooler.dense", "classifier"]


def _base(folder, workdir):
    """Returns a workdir of the same parameters with updates of zero, merged."""
    mesh, rules = exporting.one_device()

    def read(step_dir, meta):
        params = helpers.random_model(meta.config.model, mesh, rules)
        nested = trees.to_nested(params)
        nested = jax.tree_util.tree_map_with_path(
            lambda path, x: 0 * x if "_up_" in jax.tree_util.keystr(path) else x, nested
        )
        with jax.set_mesh(mesh):
            plain = lora.merged(meta.config.model, nested)
        config = dataclasses.replace(meta.config, model=lora.without(meta.config.model))
        checkpoint.save_params(
            str(folder / "base"), config, meta.tokenizer, plain, labels=meta.labels
        )

    checkpoint.read_latest(workdir, None, read)
    return str(folder / "base")


def test_what_has_no_place_is_refused(tmp_path):
    tune = config_lib.TuneConfig(learn="*/lora/*,*norm*")
    workdir = _workdir(tmp_path, {}, "attention/q", tune)
    with pytest.raises(errors.UserError, match="learned beside the updates"):
        adapters.export_adapter(workdir, tmp_path / "adapter", None, "llama")
    with pytest.raises(errors.UserError, match="merge"):
        exporting.export_model(workdir, tmp_path / "hf", None, exporting.Options("llama"))
    adapters.merge(workdir, str(tmp_path / "merged"), None)
    with pytest.raises(errors.UserError, match="no low-rank updates"):
        adapters.merge(str(tmp_path / "merged"), str(tmp_path / "again"), None)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_it_and_computes_the_same(tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    settings, family, targets = MODELS[name]
    workdir = _workdir(tmp_path, settings, targets)
    _export(tmp_path, workdir, family)
    kind = {
        "bert": transformers.AutoModelForSequenceClassification,
        "t5": transformers.AutoModelForSeq2SeqLM,
    }.get(name, transformers.AutoModelForCausalLM)
    ids = torch.tensor(np.random.default_rng(0).integers(0, 32, (2, 9)))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})
    with torch.no_grad():
        base = kind.from_pretrained(tmp_path / "base_hf").eval()
        before = base(**inputs).logits.clone()
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        found = adapted(**inputs).logits
        wanted = kind.from_pretrained(tmp_path / "hf").eval()(**inputs).logits
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 1e-2
