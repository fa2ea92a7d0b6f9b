"""Writes the goldens of Hugging Face models: `python -m tests.golden.hf.make [NAME..]`, with torch and
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

from tests.golden.hf import variants

FOLDER = pathlib.Path(__file__).parent
LENGTH, NEW_TOKENS = 10, 12
LENGTHS = (10, 7, 4)  # tokens of each row
TARGET_LENGTH = 6  # of an encoder-decoder's rows


def make_model(name: str, settings: dict[str, Any], seed: int) -> torch.nn.Module:
    """Returns a variant with every parameter random, norms and biases included."""
    architecture, config_class, _ = variants.VARIANTS[name]
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
            is_decoder = name not in variants.ENCODERS + variants.ENCODER_DECODERS
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
    ids = np.full((len(rows), LENGTH), variants.PAD, np.int64)
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
    if name in variants.ENCODER_DECODERS:
        decoder_ids = rng.integers(3, variants.VOCAB, (len(rows), TARGET_LENGTH))
        decoder_ids[:, 0] = model.config.decoder_start_token_id
        inputs["decoder_input_ids"] = decoder_ids
    elif name in variants.ENCODERS:
        if name != "modernbert":
            inputs["token_type_ids"] = (np.cumsum(mask, 1) > 3).astype(np.int64) * mask
    else:
        inputs["position_ids"] = np.maximum(np.cumsum(mask, 1) - 1, 0)  # as `generate` has them
    return {key: torch.tensor(value) for key, value in inputs.items()}


def loss_of(name: str, logits, inputs, targets) -> torch.Tensor:
    """Returns the mean cross-entropy over what is to be predicted, and nothing else."""
    if name == "bert_classifier":
        return torch.nn.functional.cross_entropy(logits, targets[:, 0] % logits.shape[1])
    if name in variants.ENCODERS:
        counts = inputs["attention_mask"].bool()
        return torch.nn.functional.cross_entropy(logits[counts], targets[counts])
    if name in variants.ENCODER_DECODERS:
        targets = targets[:, :TARGET_LENGTH]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    counts = inputs["attention_mask"][:, 1:].bool()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1][counts], inputs["input_ids"][:, 1:][counts]
    )


def generations(name: str, model, rows) -> dict[str, np.ndarray]:
    """Returns greedy and beam continuations of the rows, with an end that some of them reach."""
    side = "right" if name in variants.ENCODER_DECODERS else "left"
    ids, mask = (torch.tensor(x) for x in padded(rows, side))
    how = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": variants.PAD}
    skip = 1 if name in variants.ENCODER_DECODERS else LENGTH

    def generate(**more):
        return model.generate(ids, attention_mask=mask, **how, **more)

    free = generate(eos_token_id=None)[:, skip:].numpy()
    # The token that ends the fewest rows first, but at least one.
    tokens = set(free.flatten()) - {variants.PAD}
    firsts = {t: [list(r).index(t) if t in r else 99 for r in free] for t in tokens}
    eos = min(firsts, key=lambda t: (abs(sum(at < 99 for at in firsts[t]) - 1), t))
    result = {"eos_id": np.array(eos), "greedy_free": free}
    result["greedy"] = generate(eos_token_id=int(eos))[:, skip:].numpy()
    if name not in variants.WITH_BEAMS:
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
    rows = [rng.integers(3, variants.VOCAB, length) for length in LENGTHS]
    targets = torch.tensor(rng.integers(3, variants.VOCAB, (len(rows), LENGTH)))
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
    if name in variants.ENCODER_DECODERS:
        kinds = {"encoder": out.encoder_hidden_states, "decoder": out.decoder_hidden_states}
    else:
        kinds = {"hidden": out.hidden_states}
    for kind, states in kinds.items():
        result |= {f"{kind}/{i}": state.detach().numpy() for i, state in enumerate(states)}
    if name not in variants.ENCODERS:
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
    for name in sys.argv[1:] or variants.ORDER:
        write(name, FOLDER / name, variants.VARIANTS[name][2], seed=variants.ORDER.index(name))
        print(name, flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
