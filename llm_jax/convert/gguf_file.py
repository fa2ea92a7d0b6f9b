"""A GGUF file (llama.cpp's format) of a Llama, told as a Hugging Face folder would.

Tensors are dequantised one at a time, to float32. Rows of queries and keys are stored in the order of
rotary pairs side by side, and are put back (llama.cpp's `convert_hf_to_gguf.py` says so).
"""

from collections.abc import Mapping
import pathlib
from typing import Any

import gguf
import numpy as np

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.convert import gguf_tokenizer
from llm_jax.convert import source as source_lib
from llm_jax.convert import tensors as tensors_lib
from llm_jax.models import positions

_ARCHITECTURE = "llama"

# Theirs in a Hugging Face folder, by those of the file; `blk.3.` is `model.layers.3.`.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Of metadata, after "llama."; the default where it may be missing.
_SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_FREQUENCIES = "rope_freqs.weight"  # what Llama 3's scaling divides frequencies by
# All published models of that scaling have these; the file has the result alone.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def open_file(path: pathlib.Path, has_tokenizer: bool) -> source_lib.Source:
    """Reads a file, but for its tensors.

    Raises:
      errors.UserError: it is no GGUF file, is cut short, or holds no Llama.
    """
    if not path.is_file():
        raise errors.UserError(f"{path} is no file")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise errors.UserError(f"{path} is no GGUF file, or cut short: {error}") from error
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer.") or has_tokenizer
    }
    name = metadata.get("general.architecture")
    if name != _ARCHITECTURE:
        raise errors.UserError(f"{path} holds a model of {name!r}; llm_jax reads {_ARCHITECTURE!r}")
    tensors = Tensors(path, reader, metadata)
    config = _config(path, metadata, tensors)
    tokenizer = gguf_tokenizer.read(metadata) if has_tokenizer else None
    files = {} if tokenizer is None else gguf_tokenizer.files(metadata, tokenizer)
    config |= gguf_tokenizer.special_ids(metadata)
    return source_lib.Source(path, config, tensors, {"format": "pt"}, tokenizer, files)


class Tensors:
    """The tensors of a file under the names, and in the order of rows, of a Hugging Face folder."""

    def __init__(self, path: pathlib.Path, reader: Any, metadata: Mapping[str, Any]):
        self._num_heads = {
            ".self_attn.q_proj.weight": metadata.get("llama.attention.head_count"),
            ".self_attn.k_proj.weight": _num_kv_heads(metadata),
        }
        self._tensors = {_name(t.name): t for t in reader.tensors if t.name != _FREQUENCIES}
        self.frequencies = next((t.data for t in reader.tensors if t.name == _FREQUENCIES), None)
        kinds = {t.tensor_type for t in self._tensors.values()}
        unknown = sorted(kind.name for kind in kinds if not _is_known(kind))
        if unknown:
            raise errors.UserError(
                f"{path} has tensors of {', '.join(unknown)}, which gguf cannot read"
            )

    @property
    def infos(self) -> dict[str, tensors_lib.TensorInfo]:
        dtype = np.dtype(np.float32)
        return {
            name: tensors_lib.TensorInfo(tuple(int(n) for n in reversed(t.shape)), dtype)
            for name, t in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        for ending, num_heads in self._num_heads.items():
            if name.endswith(ending):
                return _unpermuted(values, num_heads)
        return values


def _is_known(kind: gguf.GGMLQuantizationType) -> bool:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return block > 0


def _unpermuted(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Returns rows of heads whose rotary pairs lie half a head apart, of such with them side by side."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _name(name: str) -> str:
    """Returns the name of a tensor in a Hugging Face folder; the same, where it is not known."""
    before, _, ending = name.rpartition(".")
    if before in _NAMES:
        return f"{_NAMES[before]}.{ending}"
    parts = before.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _NAMES:
        return f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.{ending}"
    return name


def _num_kv_heads(metadata: Mapping[str, Any]) -> Any:
    heads = metadata.get("llama.attention.head_count")
    return metadata.get("llama.attention.head_count_kv", heads)


def _config(path: pathlib.Path, metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """Returns what a `config.json` would say."""

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{_ARCHITECTURE}.{key}", default)

    sizes = {key: get(name) for key, name in _SIZES.items()}
    sizes["num_key_value_heads"] = _num_kv_heads(metadata)
    missing = [_SIZES[key] for key, value in sizes.items() if value is None]
    if missing:
        raise errors.UserError(f"{path} does not say {', '.join(missing)}")
    many = [key for key, value in sizes.items() if isinstance(value, list)]
    if many:
        raise errors.UserError(
            f"{path} has {', '.join(many)} of each layer; llm_jax has one for all"
        )
    for key in ("expert_count", "attention.sliding_window", "attention.clamp_kqv"):
        if get(key):
            raise errors.UserError(
                f"{path}: {_ARCHITECTURE}.{key} = {get(key)} cannot be represented"
            )
    width = get("attention.key_length", sizes["hidden_size"] // sizes["num_attention_heads"])
    if get("rope.dimension_count", width) != width:
        raise errors.UserError(
            f"{path} rotates {get('rope.dimension_count')} of {width} elements of a head; Llama all"
        )
    infos = tensors.infos
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "rms_norm_eps": _shortest(sizes["rms_norm_eps"]),
        "head_dim": width,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": _shortest(get("rope.freq_base", 10_000.0)),
        "rope_scaling": None,
        "vocab_size": infos["model.embed_tokens.weight"].shape[0]
        if "model.embed_tokens.weight" in infos
        else get("vocab_size"),
        "tie_word_embeddings": "lm_head.weight" not in infos,
        "torch_dtype": "float32",
    }
    return config | {"rope_scaling": _rope_scaling(path, config, get, tensors.frequencies)}


def _shortest(value: float) -> float:
    """Returns the number that a float32 was written as: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    path: pathlib.Path, config: Mapping[str, Any], get: Any, factors: np.ndarray | None
) -> dict[str, Any] | None:
    # As llama.cpp reads them: linear where no type is said, by a factor that has an older name, too.
    kind = get("rope.scaling.type", "linear")
    factor = get("rope.scaling.factor") or get("rope.scale_linear") or 1.0
    if kind == "linear" and factor != 1.0:
        return {"rope_type": "linear", "factor": _shortest(factor)}
    if kind not in ("linear", "none"):
        raise errors.UserError(f"{path}: {_ARCHITECTURE}.rope.scaling.type = {kind!r} is not known")
    if factors is None:
        return None
    scaling = {"factor": float(np.max(factors)), **_LLAMA3}
    plain = config_lib.ModelConfig(head_dim=config["head_dim"], rope_theta=config["rope_theta"])
    scaled = config_lib.ModelConfig(
        head_dim=config["head_dim"],
        rope_theta=config["rope_theta"],
        rope_scaling="llama3",
        rope_scaling_factor=scaling["factor"],
        rope_low_freq_factor=scaling["low_freq_factor"],
        rope_high_freq_factor=scaling["high_freq_factor"],
        rope_original_length=scaling["original_max_position_embeddings"],
    )
    expected = positions.rotary_frequencies(plain) / positions.rotary_frequencies(scaled)
    if not np.allclose(factors, expected, rtol=1e-4):
        raise errors.UserError(
            f"{path}: {_FREQUENCIES} is not of Llama 3's scaling with {scaling}, the only one that is known"
        )
    return {"rope_type": "llama3", **scaling}
