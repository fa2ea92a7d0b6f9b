"""Writes the goldens of Hugging Face models: `python tests/golden/hf/make.py [NAME..]`, with torch and
transformers; of these variants, or of all.

Each variant is a tiny random model as `save_pretrained` writes it (`config.json`, `model.safetensors`) and
`outputs.safetensors`: what the model makes of a few rows. Everything follows from the seeds below; the
tests read the files with `goldens.py` and need neither torch nor transformers.
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np
from safetensors import numpy as safetensors_numpy
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
VOCAB, PAD, LENGTH, NEW_TOKENS = 40, 0, 10, 12
LENGTHS = (10, 7, 4)  # tokens of each row
TARGET_LENGTH = 6  # of an encoder-decoder's rows

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2}
_FINE_EXPERTS = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3}
_BERT = {"type_vocab_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 8,
    "dropout_rate": 0.0,
    "pad_token_id": PAD,
    "decoder_start_token_id": PAD,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

# Widths of a head differ, as do those of the two latents; layers are dense.
_LATENTS = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 16,
}

# Name: architecture, config class and settings.
VARIANTS = {
    "bert": ("BertForMaskedLM", "BertConfig", _SMALL | _BERT),
    "bert_classifier": (
        "BertForSequenceClassification",
        "BertConfig",
        _SMALL | _BERT | {"num_labels": 3, "classifier_dropout": 0.0},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        _SMALL
        | {
            "num_hidden_layers": 4,
            "global_attn_every_n_layers": 3,
            "local_attention": 4,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "t5_v1_0": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5 | {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    ),
    "t5_v1_1": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "marian": (
        "MarianMTModel",
        "MarianConfig",
        {
            "vocab_size": VOCAB,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 64,
            "scale_embedding": True,
            "activation_function": "relu",
            "dropout": 0.0,
            "pad_token_id": PAD,
            "decoder_start_token_id": 1,  # not padding, which its table gives no gradient
            "eos_token_id": 2,
            "forced_eos_token_id": None,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": PAD,
        },
    ),
    "llama2": ("LlamaForCausalLM", "LlamaConfig", _SMALL),
    "llama3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        _SMALL | _GROUPED | {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", _SMALL | _GROUPED | {"sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _SMALL | _GROUPED),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        _SMALL | _GROUPED | {"head_dim": 6, "tie_word_embeddings": True},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _SMALL
        | _GROUPED
        | {
            "head_dim": 6,
            "sliding_window": 4,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _SMALL
        | _GROUPED
        | {
            "num_hidden_layers": 5,
            "head_dim": 6,
            "sliding_window": 4,
            "query_pre_attn_scalar": 10,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "rope_parameters": _GEMMA3_ROPE,
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _SMALL | _GROUPED),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        _SMALL
        | _LATENTS
        | {
            "q_lora_rank": None,
            "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _SMALL | _LATENTS),
    "deepseek_v3_halves": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _SMALL | _LATENTS | {"q_lora_rank": None, "rope_interleave": False, "rms_norm_eps": 1e-3},
    ),
    "deepseek_v3_yarn": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _SMALL | _LATENTS | {"rope_parameters": _YARN | {"mscale": 1.5, "mscale_all_dim": 0.8}},
    ),
    "llama_yarn": ("LlamaForCausalLM", "LlamaConfig", _SMALL | {"rope_parameters": _YARN}),
    "deepseek_v2_experts": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        _SMALL
        | _LATENTS
        | _FINE_EXPERTS
        | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    ),
    "deepseek_v3_experts": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _SMALL | _LATENTS | _FINE_EXPERTS,
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        _SMALL | _GROUPED | {"num_local_experts": 4, "sliding_window": None},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _SMALL
        | _GROUPED
        | _EXPERTS
        | {
            "num_hidden_layers": 3,
            "head_dim": 6,
            "moe_intermediate_size": 12,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_moe_every_second": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _SMALL
        | _GROUPED
        | _EXPERTS
        | {"num_hidden_layers": 4, "moe_intermediate_size": 12, "decoder_sparse_step": 2},
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", _SMALL | _GROUPED | _EXPERTS),
}
# A place is a seed: a new variant goes last.
ORDER = (
    *(
        "bert",
        "bert_classifier",
        "gemma2",
        "gemma3",
        "gpt2",
        "llama2",
        "llama3",
        "marian",
        "mistral",
    ),
    *("modernbert", "olmo2", "qwen2", "qwen3", "t5_v1_0", "t5_v1_1", "deepseek_v2", "deepseek_v3"),
    *("deepseek_v3_halves", "deepseek_v3_yarn", "llama_yarn"),
    *("mixtral", "qwen3_moe", "qwen3_moe_every_second", "olmoe"),
    *("deepseek_v2_experts", "deepseek_v3_experts"),
)
WITH_BEAMS = ("gpt2", "llama3", "deepseek_v3", "t5_v1_0", "t5_v1_1", "marian")
ENCODERS = ("bert", "bert_classifier", "modernbert")
ENCODER_DECODERS = ("t5_v1_0", "t5_v1_1", "marian")


def make_model(name: str, settings: dict[str, Any], seed: int) -> torch.nn.Module:
    """Returns a variant with every parameter random, norms and biases included."""
    architecture, config_class, _ = VARIANTS[name]
    settings = dict(settings)
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][: settings["num_hidden_layers"]]
    config = getattr(transformers, config_class)(**settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, architecture)(config).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Norms that scale by 1 + weight start at 0; all others at 1.
            is_scale = parameter.ndim == 1 and not key.endswith("bias")
            mean = 1.0 if is_scale and "gemma" not in name else 0.0
            # Matrices are as large as rounding allows: greedy text should not repeat one token.
            is_decoder = name not in ENCODERS + ENCODER_DECODERS
            spread = 0.45 if parameter.ndim > 1 and is_decoder else 0.3
            drawn = mean + spread * rng.standard_normal(tuple(parameter.shape))
            if "embed_positions" not in key:  # Marian's are sinusoids
                parameter.copy_(torch.tensor(drawn, dtype=torch.float32))
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.tensor(0.1 * rng.standard_normal(tuple(buffer.shape))))
        if name == "marian":
            bias = 0.3 * rng.standard_normal((1, config.vocab_size))
            model.final_logits_bias.copy_(torch.tensor(bias))
    return model


def padded(rows: list[np.ndarray], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and mask, int64 [B, T], padded on one side."""
    ids = np.full((len(rows), LENGTH), PAD, np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(LENGTH - len(row), LENGTH)
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def inputs_of(
    name: str, model, rng: np.random.Generator, side: str, rows
) -> dict[str, torch.Tensor]:
    """Returns what a variant's forward pass takes of the rows."""
    ids, mask = padded(rows, side)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name in ENCODER_DECODERS:
        decoder_ids = rng.integers(3, VOCAB, (len(rows), TARGET_LENGTH))
        decoder_ids[:, 0] = model.config.decoder_start_token_id
        inputs["decoder_input_ids"] = decoder_ids
    elif name in ENCODERS:
        if name != "modernbert":
            inputs["token_type_ids"] = (np.cumsum(mask, 1) > 3).astype(np.int64) * mask
    else:
        inputs["position_ids"] = np.maximum(np.cumsum(mask, 1) - 1, 0)  # as `generate` has them
    return {key: torch.tensor(value) for key, value in inputs.items()}


def loss_of(name: str, logits, inputs, targets) -> torch.Tensor:
    """Returns the mean cross-entropy over what is to be predicted, and nothing else."""
    if name == "bert_classifier":
        return torch.nn.functional.cross_entropy(logits, targets[:, 0] % logits.shape[1])
    if name in ENCODERS:
        counts = inputs["attention_mask"].bool()
        return torch.nn.functional.cross_entropy(logits[counts], targets[counts])
    if name in ENCODER_DECODERS:
        targets = targets[:, :TARGET_LENGTH]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    counts = inputs["attention_mask"][:, 1:].bool()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1][counts], inputs["input_ids"][:, 1:][counts]
    )


def generations(name: str, model, rows) -> dict[str, np.ndarray]:
    """Returns greedy and beam continuations of the rows, with an end that some of them reach."""
    side = "right" if name in ENCODER_DECODERS else "left"
    ids, mask = (torch.tensor(x) for x in padded(rows, side))
    how = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": PAD}
    skip = 1 if name in ENCODER_DECODERS else LENGTH

    def generate(**more):
        return model.generate(ids, attention_mask=mask, **how, **more)

    free = generate(eos_token_id=None)[:, skip:].numpy()
    # The token that ends the fewest rows first, but at least one.
    tokens = set(free.flatten()) - {PAD}
    firsts = {t: [list(r).index(t) if t in r else 99 for r in free] for t in tokens}
    eos = min(firsts, key=lambda t: (abs(sum(at < 99 for at in firsts[t]) - 1), t))
    result = {"eos_id": np.array(eos), "greedy_free": free}
    result["greedy"] = generate(eos_token_id=int(eos))[:, skip:].numpy()
    if name not in WITH_BEAMS:
        return result
    for stopping in (False, True, "never"):
        for penalty in (0.6, 1.5):
            beams = generate(
                eos_token_id=int(eos),
                num_beams=4,
                num_return_sequences=2,
                length_penalty=penalty,
                early_stopping=stopping,
                return_dict_in_generate=True,
                output_scores=True,
            )
            key = f"beams/{stopping}/{penalty}".lower()
            result[f"{key}/ids"] = beams.sequences[:, skip:].numpy()
            result[f"{key}/scores"] = beams.sequences_scores.numpy()
    return result


def as_saved(name: str, key: str, value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Returns what a parameter is in files, where experts, one array in memory, are one by one."""
    if name == "mixtral":
        key = key.replace(".mlp.", ".block_sparse_moe.")
    if ".experts." not in key:
        return [(key, value)]
    gate, up, down = (
        ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    )
    experts, kind = key.rsplit(".", 1)
    found = []
    for index, own in enumerate(value):
        parts = {down: own} if kind == "down_proj" else dict(zip((gate, up), own.chunk(2)))
        found += [(f"{experts}.{index}.{part}.weight", x) for part, x in parts.items()]
    return found


def outputs(name: str, model) -> dict[str, np.ndarray]:
    """Returns all that a variant's test compares."""
    rng = np.random.default_rng(100)
    rows = [rng.integers(3, VOCAB, length) for length in LENGTHS]
    targets = torch.tensor(rng.integers(3, VOCAB, (len(rows), LENGTH)))
    result = {"targets": targets.numpy()}
    for side in ("left", "right"):
        inputs = inputs_of(name, model, np.random.default_rng(101), side, rows)
        out = model(**inputs, output_hidden_states=True)
        result |= {f"{side}/{key}": value.numpy() for key, value in inputs.items()}
        result[f"{side}/logits"] = out.logits.detach().numpy()
    loss = loss_of(name, out.logits, inputs, targets)
    loss.backward()
    result["loss"] = loss.detach().numpy()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.requires_grad:
            for saved, grad in as_saved(name, key, parameter.grad):
                result[f"gradient/{saved}"] = grad.numpy()
    if name in ENCODER_DECODERS:
        kinds = {"encoder": out.encoder_hidden_states, "decoder": out.decoder_hidden_states}
    else:
        kinds = {"hidden": out.hidden_states}
    for kind, states in kinds.items():
        result |= {f"{kind}/{i}": state.detach().numpy() for i, state in enumerate(states)}
    if name not in ENCODERS:
        result |= generations(name, model, rows)
    return result


def write(name: str, folder: pathlib.Path, settings: dict[str, Any], seed: int) -> None:
    """Writes a variant's folder, its parameters drawn from a seed."""
    model = make_model(name, settings, seed)
    results = outputs(name, model)
    model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    arrays = {}
    for key, value in results.items():
        kind = np.float32 if value.dtype.kind == "f" else np.int32
        arrays[key] = np.ascontiguousarray(value.astype(kind))
    safetensors_numpy.save_file(arrays, folder / "outputs.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ORDER:
        write(name, FOLDER / name, VARIANTS[name][2], seed=ORDER.index(name))
        print(name, flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
