"""Models of random shapes beside `transformers` itself; skipped where torch and transformers are not installed.

`pip install -e '.[test,live]'` installs them.
"""

from typing import Any

import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax import trees
from tests import helpers
from tests.convert import folders
from tests.convert import parity
from tests.golden.hf import goldens
from tests.golden.hf import variants

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.golden.hf import make  # noqa: E402 -- imports torch

pytestmark = pytest.mark.slow

_SEEDS = (0, 1, 2)
# Nobody chose these shapes for how little they round: of T5's, whose scores are not scaled, torch's own
# gradients in float32 are up to 2e-4 from those in float64. The committed goldens have the narrow bounds.
_ROUNDING = 10


def _random_settings(name: str, rng: np.random.Generator) -> dict[str, Any]:
    """Returns a variant's settings with other sizes and options."""
    settings = dict(variants.VARIANTS[name][2])

    def among(*values):
        return values[rng.integers(len(values))]

    heads, head_width = int(rng.integers(1, 7)), among(2, 4, 6, 8)
    width = heads * head_width
    if "d_kv" in settings or "head_dim" in settings:  # heads as wide as they like
        width = heads * 2 * int(rng.integers(2, 6))
    layers, mlp_width = int(rng.integers(1, 4)), int(rng.integers(4, 40))
    drawn = {
        "vocab_size": int(rng.integers(variants.VOCAB, 90)),
        "head_dim": head_width,
        "d_kv": head_width,
        "num_key_value_heads": among(*(k for k in range(1, heads + 1) if heads % k == 0)),
        "relative_attention_num_buckets": 2 * int(rng.integers(2, 9)),
        "relative_attention_max_distance": int(rng.integers(20, 40)),
        "sliding_window": int(rng.integers(2, 9)),  # with 1 their cache keeps all keys
        "local_attention": 2 * int(rng.integers(1, 5)),
        "query_pre_attn_scalar": int(rng.integers(1, 20)),
        "attn_logit_softcapping": float(rng.uniform(1, 4)),
        "final_logit_softcapping": float(rng.uniform(1, 4)),
        "scale_embedding": among(True, False),
        "feed_forward_proj": among("relu", "gated-gelu", "gated-silu"),
        "activation_function": among("gelu_new", "relu", "silu"),
        "num_labels": int(rng.integers(2, 6)),
    }
    for names, value in {
        ("hidden_size", "d_model", "n_embd"): width,
        ("num_attention_heads", "num_heads", "n_head"): heads,
        ("encoder_attention_heads", "decoder_attention_heads"): heads,
        ("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"): mlp_width,
        ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers"): layers,
        ("decoder_layers",): int(rng.integers(1, 4)),
    }.items():
        drawn |= dict.fromkeys(names, value)
    if "kv_lora_rank" in settings:
        drawn |= _random_latents(rng, heads, layers)
    if settings.keys() & _EXPERTS:
        drawn |= _random_experts(rng, name, layers, heads)
    settings |= {key: value for key, value in drawn.items() if key in settings}
    if name.startswith("t5"):
        settings["tie_word_embeddings"] = among(True, False)
        # Their cache has as many layers as the encoder.
        settings["num_decoder_layers"] = int(rng.integers(1, layers + 1))
    elif name in goldens.DECODERS and name != "gpt2":
        settings["tie_word_embeddings"] = among(True, False)
        settings["rms_norm_eps"] = float(10.0 ** -rng.uniform(2, 6))
    if name in ("llama2", "mistral", "qwen2", "qwen3", "olmo2"):
        settings["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": float(rng.uniform(50, 5000)),
        }
    return settings


_EXPERTS = {"num_experts", "num_local_experts", "n_routed_experts"}


def _random_experts(rng: np.random.Generator, name: str, layers: int, heads: int) -> dict[str, Any]:
    """Returns settings of experts; their code multiplies rows of a multiple of 16 bytes alone."""
    num_groups = int(rng.integers(1, 4))
    num_experts = num_groups * int(rng.integers(2, 5))
    in_groups = int(rng.integers(1, num_groups + 1))
    per_token = int(rng.integers(1, in_groups * (num_experts // num_groups) + 1))
    every = int(rng.integers(1, layers + 1)) if "second" in name else 1
    return dict.fromkeys(_EXPERTS, num_experts) | {
        "hidden_size": heads * 4 * int(rng.integers(1, 4)),
        "intermediate_size": 4 * int(rng.integers(1, 9)),
        "moe_intermediate_size": 4 * int(rng.integers(1, 9)),
        "num_experts_per_tok": per_token,
        "n_shared_experts": int(rng.integers(1, 3)),
        "n_group": num_groups,
        "topk_group": in_groups,
        "norm_topk_prob": bool(rng.integers(2)),
        "routed_scaling_factor": float(rng.uniform(0.5, 3)),
        "first_k_dense_replace": int(rng.integers(0, layers)),
        "mlp_only_layers": list(range(int(rng.integers(0, layers)))),
        "decoder_sparse_step": every,
    }


def _random_latents(rng: np.random.Generator, heads: int, layers: int) -> dict[str, Any]:
    """Returns settings of latent attention; even widths, as V2's rotation needs even strides."""
    return {
        "num_key_value_heads": heads,
        "kv_lora_rank": 2 * int(rng.integers(1, 10)),
        "q_lora_rank": int(rng.integers(1, 20)) if rng.integers(2) else None,
        "qk_nope_head_dim": 2 * int(rng.integers(1, 5)),
        "qk_rope_head_dim": 2 * int(rng.integers(1, 5)),
        "v_head_dim": int(rng.integers(1, 9)),
        "first_k_dense_replace": layers,
        "rope_interleave": bool(rng.integers(2)),
    }


@pytest.fixture(
    scope="module",
    params=[(name, seed) for name in variants.VARIANTS for seed in _SEEDS],
    ids=lambda param: "-".join(map(str, param)),
)
def live(request, tmp_path_factory):
    """Returns a golden of random shapes, written and read as the committed ones are."""
    name, seed = request.param
    rng = np.random.default_rng([seed, sorted(variants.VARIANTS).index(name)])
    folder = tmp_path_factory.mktemp(f"{name}_{seed}") / "model"
    make.write(name, folder, _random_settings(name, rng), seed=100 + seed)
    return parity.convert(goldens.read(name, folder))


@pytest.mark.parametrize("check", parity.CHECKS)
def test_equals_transformers(live, check):
    of = parity.CHECKS[check]
    if live.golden.name not in of.names:
        pytest.skip("the model has none")
    assert of.compare(live) <= _ROUNDING * of.tolerance


def _logits(folder, architecture: str, inputs) -> np.ndarray:
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


def test_transformers_loads_what_is_exported(live, tmp_path):
    name, folder = live.golden.name, live.golden.folder
    folders.import_ids(folder, tmp_path / "run")
    back = folders.export(tmp_path / "run", tmp_path / "back")
    inputs = {
        key.removeprefix("right/"): torch.tensor(value)
        for key, value in live.golden.outputs.items()
        if key.startswith("right/") and key != "right/logits"
    }
    architecture = variants.VARIANTS[name][0]
    logits = _logits(back, architecture, inputs)
    np.testing.assert_array_equal(logits, _logits(folder, architecture, inputs))


@pytest.mark.parametrize(
    "architecture, family, model",
    [
        ("LlamaForCausalLM", "llama", {"tie_embeddings": False}),
        ("GPT2LMHeadModel", "gpt2", helpers.GPT2),
        ("DeepseekV3ForCausalLM", "deepseek_v3", helpers.LATENTS | {"tie_embeddings": False}),
        ("BertForMaskedLM", "bert", helpers.BERT),
        ("T5ForConditionalGeneration", "t5", helpers.T5),
    ],
)
def test_transformers_loads_runs_of_ours(architecture, family, model, tmp_path):
    config = helpers.tiny_run_config(model)
    mesh, rules = helpers.make_mesh()
    model = helpers.random_model(config.model, mesh, rules)
    checkpoint.save_params(str(tmp_path / "run"), config, {"kind": "bytes"}, trees.to_nested(model))
    folder = folders.export(tmp_path / "run", tmp_path / "model", family=family)
    assert folders.config_of(folder)["architectures"] == [architecture]
    ids = torch.randint(0, config.model.vocab_size, (3, 7), generator=torch.manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.model.architecture == "encoder_decoder":
        inputs["decoder_input_ids"] = ids[:, :4]
    elif config.model.architecture == "decoder":
        inputs["position_ids"] = torch.arange(7).expand(3, 7)
    outputs = {key: value.numpy() for key, value in inputs.items()}
    outputs["logits"] = _logits(folder, architecture, inputs)
    outputs = {f"{side}/{k}": value for side in ("right", "left") for k, value in outputs.items()}
    golden = goldens.Golden(architecture, folder, folders.config_of(folder), outputs)
    converted = parity.convert(golden)
    helpers.assert_equal(trees.to_nested(converted.model), trees.to_nested(model))
    assert parity.logits(converted) <= parity.CHECKS["logits"].tolerance
