"""What cannot be converted is one error that names it."""

import dataclasses
import json

import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import trees
from llm_jax.convert import engine
from tests import helpers
from tests.convert import folders


def _refusal(folder, tmp_path) -> str:
    with pytest.raises(errors.UserError) as caught:
        folders.import_ids(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing was written"
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- tensors ------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_all_listed_by_name(tmp_path):
    def change(arrays):
        del arrays["model.norm.weight"], arrays["model.layers.1.mlp.up_proj.weight"]
        arrays["model.layers.0.mlp.experts.weight"] = np.zeros(3, np.float32)
        arrays["model.embed_tokens.weight"] = np.zeros((41, 16), np.float32)
        arrays["lm_head.weight"] = np.zeros((40, 16), np.int8)
        return arrays

    message = _refusal(folders.copy("llama2", tmp_path / "model", change), tmp_path)
    assert "missing: model.norm.weight, model.layers.1.mlp.up_proj.weight;" in message
    assert "unknown (--skip leaves some out): model.layers.0.mlp.experts.weight;" in message
    assert "of shape [41, 16] where [40, 16] is wanted: model.embed_tokens.weight" in message
    assert "no floating-point numbers: lm_head.weight" in message


def test_layers_are_listed_as_one(tmp_path):
    folder = folders.copy("llama2", tmp_path / "model", num_hidden_layers=5)
    message = _refusal(folder, tmp_path)
    assert "model.layers.{2-4}.self_attn.q_proj.weight" in message
    names = [f"h.{i}.a" for i in (0, 1, 2, 4, 7, 8)] + ["wte", "h.3.b"]
    assert engine.grouped(names) == "h.{0-2,4,7-8}.a, wte, h.3.b"


def test_tensors_are_skipped_on_demand(tmp_path):
    def change(arrays):
        return arrays | {"cls.seq_relationship.weight": np.zeros((2, 16), np.float32)}

    folder = folders.copy("bert", tmp_path / "model", change)
    assert "out): cls.seq_relationship.weight" in _refusal(folder, tmp_path)
    folders.import_ids(folder, tmp_path / "run", skipped=("cls.seq_*",))
    back = folders.export(tmp_path / "run", tmp_path / "back")
    assert "cls.seq_relationship.weight" not in folders.arrays_of(back)


def test_tied_tensors_that_differ_are_refused(tmp_path):
    def change(arrays):
        return arrays | {"lm_head.weight": arrays["transformer.wte.weight"] + 1}

    message = _refusal(folders.copy("gpt2", tmp_path / "model", change), tmp_path)
    assert "lm_head.weight" in message and "ties it to transformer.wte.weight" in message


def test_buffers_that_do_not_follow_from_the_config_are_refused(tmp_path):
    def change(arrays):
        return arrays | {"bert.embeddings.position_ids": np.arange(64)[None, ::-1].copy()}

    message = _refusal(folders.copy("bert", tmp_path / "model", change), tmp_path)
    assert "bert.embeddings.position_ids is not what it should be" in message


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, changes, expected",
    [
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx = True",
        ),
        ("gpt2", {"activation_function": "mish"}, "activation_function = 'mish'"),
        ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]}, "architectures = 'GPT2DoubleHeads"),
        ("llama2", {"attention_bias": True}, "attention_bias = True with mlp_bias = False"),
        ("llama2", {"hidden_size": "16"}, "embed_dim = '16' is a str"),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope_parameters.rope_type = 'longrope'",
        ),
        ("llama3", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters lacks factor"),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
            "rope_parameters.truncate = False",
        ),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "mscale": 1.0}},
            "rope_parameters has mscale",
        ),
        (
            "deepseek_v3",
            {"topk_method": "greedy"},
            "topk_method = 'greedy' (llm_jax has 'noaux_tc' alone)",
        ),
        ("deepseek_v2_experts", {"topk_method": "best"}, "topk_method = 'best'"),
        ("deepseek_v3_experts", {"num_experts_per_tok": 5}, "must hold experts_per_token = 5"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers = [1]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "llm_jax has one of them"),
        (
            "deepseek_v3",
            {"num_key_value_heads": 2},
            "num_key_value_heads = 2 with num_attention_heads = 4",
        ),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias = True"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama3", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters lacks factor"),
        (
            "llama3",
            {"rope_parameters": {"mrope_section": [1]}},
            "rope_parameters has mrope_section",
        ),
        (
            "llama2",
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_type": "linear"}},
            "rope_parameters and rope_scaling are both there",
        ),
        ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("gemma3", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters has rope_theta"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "layer_types has chunked_attention"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types has 3 layers"),
        ("bert_classifier", {"id2label": ["bad", "good", "ugly"]}, "does not number labels"),
        ("gemma2", {"query_pre_attn_scalar": "x"}, "query_pre_attn_scalar = 'x'"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type = 'relative",
        ),
        ("bert", {"is_decoder": True}, "is_decoder = True"),
        ("modernbert", {"norm_bias": True}, "norm_bias = True"),
        ("t5_v1_0", {"feed_forward_proj": "gated-mish"}, "feed_forward_proj = 'gated-mish'"),
        ("marian", {"decoder_ffn_dim": 32}, "encoder_ffn_dim = 24 and decoder_ffn_dim = 32"),
        ("marian", {"decoder_vocab_size": 41}, "decoder_vocab_size = 41"),
        ("llama2", {"model_type": "lama"}, "model_type = 'lama' (did you mean 'llama'?)"),
    ],
)
def test_settings_that_cannot_be_represented_are_named(name, changes, expected, tmp_path):
    message = _refusal(folders.copy(name, tmp_path / "model", **changes), tmp_path)
    assert expected in message and str(tmp_path / "model") in message


def test_all_of_them_are_named_at_once(tmp_path):
    folder = folders.copy("bert", tmp_path / "model", is_decoder=True, hidden_act="mish")
    message = _refusal(folder, tmp_path)
    assert "is_decoder" in message and "hidden_act" in message


def test_names_of_one_tensor_and_files_of_one_model_are_not_chosen_between(tmp_path):
    def change(arrays):
        name = "bert.embeddings.LayerNorm"
        return arrays | {f"{name}.gamma": arrays[f"{name}.weight"] + 1}

    folder = folders.copy("bert", tmp_path / "model", change)
    assert "LayerNorm.gamma" in _refusal(folder, tmp_path)
    folder = folders.copy("llama2", tmp_path / "other")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "has both model.safetensors and" in _refusal(folder, tmp_path)


@pytest.mark.parametrize(
    "head, name", [("span", "qa_outputs"), ("token", "classifier"), ("sequence", "classifier")]
)
def test_heads_of_bert_have_the_names_of_their_classes(head, name, tmp_path):
    changes = {"head": head, "use_head_transform": False, "use_head_bias": False}
    changes["use_pooler"] = head == "sequence"
    folder = folders.export(_run(tmp_path, **helpers.BERT | changes), tmp_path / "model")
    assert {f"{name}.weight", f"{name}.bias"} < folders.arrays_of(folder).keys()


def test_settings_that_are_not_known_are_said(tmp_path, caplog):
    folder = folders.copy("llama2", tmp_path / "model", attention_sinks=4)
    folders.import_ids(folder, tmp_path / "run")
    assert "does not know: attention_sinks" in caplog.text


# --- the way out --------------------------------------------------------------------------------


GEMMA_CAPPED = helpers.GEMMA3 | {"activation": "gelu_tanh", "attention_softcap": 5.0}


_LATENTS = helpers.LATENTS | {"tie_embeddings": False}


def _run(tmp_path, **changes):
    config = helpers.tiny_run_config(changes)
    mesh, rules = helpers.make_mesh()
    model = helpers.random_model(config.model, mesh, rules)
    params = trees.to_nested(model)
    checkpoint.save_params(str(tmp_path / "run"), config, {"kind": "bytes"}, params)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "family, changes, expected",
    [
        ("llama", {"logit_softcap": 30.0}, "config.model.logit_softcap = 30.0 (it has None)"),
        ("llama", {"window": 8}, "config.model.window = 8 (it has None)"),
        ("llama", {"positions": "alibi"}, "config.model.positions = 'alibi' (it has 'rope')"),
        ("llama", {"activation": "relu_squared", "rope_fraction": 0.5}, "rope_fraction = 0.5"),
        ("mistral", {"window": 8, "layer_pattern": "LG"}, "config.model.layer_pattern = 'LG'"),
        (
            "gemma2",
            {"activation": "relu"},
            "config.model.norm_placement = 'pre' (it has 'sandwich')",
        ),
        ("qwen3", {"use_qk_norm": True, "qk_norm": "projection"}, "no tensors for"),
        ("gpt2", {}, "no tensors for"),
        ("gemma3_text", GEMMA_CAPPED, "config.model.attention_softcap = 5.0"),
        ("bert", helpers.BERT | {"num_token_types": 0}, "config.model.num_token_types = 0"),
        (
            "bert",
            helpers.BERT | {"head": "sequence", "use_head_transform": False},
            "it has 'lm', 'none'",
        ),
        ("deepseek_v2", _LATENTS, "config.model.rope_interleave = False (it has True)"),
        ("deepseek_v3", _LATENTS | {"attention_scale": 0.5}, "config.model.attention_scale = 0.5"),
        (
            "deepseek_v3",
            _LATENTS | {"latent_norm_epsilon": 1e-5},
            "config.model.latent_norm_epsilon = 1e-05 (it has 1e-06)",
        ),
        ("deepseek_v3", {}, "no tensors for"),
        ("llama", _LATENTS, "no tensors for"),
        ("llama", {"rope_interleave": True}, "config.model.rope_interleave = True"),
        ("lama", {}, "--family=lama is not known (did you mean 'llama'?)"),
    ],
)
def test_models_that_a_family_does_not_have_are_refused(family, changes, expected, tmp_path):
    run = _run(tmp_path, **changes)
    with pytest.raises(errors.UserError) as caught:
        folders.export(run, tmp_path / "model", family=family)
    assert expected in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "nothing was written"


def test_a_family_has_to_be_given_where_several_or_none_fit(tmp_path):
    with pytest.raises(errors.UserError, match="any of llama, mistral.*--family"):
        folders.export(_run(tmp_path / "a"), tmp_path / "model")
    with pytest.raises(errors.UserError, match="no family.*--family"):
        folders.export(_run(tmp_path / "b", positions="alibi"), tmp_path / "model")


def test_folders_that_hold_something_are_left_alone(tmp_path):
    golden = folders.copy("llama2", tmp_path / "model")
    folders.import_ids(golden, tmp_path / "run")
    with pytest.raises(errors.UserError, match="has checkpoints already"):
        folders.import_ids(golden, tmp_path / "run")
    with pytest.raises(errors.UserError, match="is not empty"):
        folders.export(tmp_path / "run", golden)
    with pytest.raises(errors.UserError, match="is a file"):
        folders.export(tmp_path / "run", golden / "config.json")
    folders.assert_same(folders.arrays_of(golden), folders.arrays_of(golden))


def test_an_export_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    folders.import_ids(folders.copy("llama2", tmp_path / "model"), tmp_path / "run")

    def fail(*_):
        assert not (tmp_path / "back").exists(), "nor while it is written"
        raise OSError("disk full")

    monkeypatch.setattr("llm_jax.convert.tokenizer_files.write", fail)
    with pytest.raises(OSError, match="disk full"):
        folders.export(tmp_path / "run", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_an_import_that_breaks_off_leaves_no_checkpoint(tmp_path, monkeypatch):
    folder = folders.copy("llama2", tmp_path / "model")
    monkeypatch.setattr("llm_jax.checkpoint.meta.make_record", lambda meta: {"no": {1, 2}})
    with pytest.raises(TypeError):
        folders.import_ids(folder, tmp_path / "run")
    assert checkpoint.steps(checkpoint.directory(str(tmp_path / "run"))) == []


def test_no_run_resumes_from_parameters_alone(tmp_path):
    folders.import_ids(folders.copy("llama2", tmp_path / "model"), tmp_path / "run")
    meta = checkpoint.read_latest(str(tmp_path / "run"), None, lambda _, meta: meta)
    config = dataclasses.replace(meta.config, train=config_lib.TrainConfig(num_steps=2))
    manager = checkpoint.Checkpoints(str(tmp_path / "run"), config, meta.tokenizer)
    from tests.checkpoint import states

    with pytest.raises(errors.UserError, match="no state of a training run"):
        states.restore(tmp_path / "run", config, *helpers.make_mesh())
    manager.close()


def test_a_record_that_is_no_json_is_told(tmp_path):
    folder = folders.copy("llama2", tmp_path / "model")
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in _refusal(folder, tmp_path)
    (folder / "config.json").write_text(json.dumps([]))
    assert "config.json is no JSON object" in _refusal(folder, tmp_path)
