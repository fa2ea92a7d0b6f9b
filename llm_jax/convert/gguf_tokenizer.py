"""The tokenizer inside a GGUF file: byte-level BPE with its way of cutting text, or SentencePiece's BPE."""

from collections.abc import Mapping
import json
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llm_jax import errors
from llm_jax.convert import tokenizer_files
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data import tokenizer_kinds

# Kinds of tokens (llama.cpp's `llama_token_type`).
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_PIECE_TYPES = {
    _UNKNOWN: "UNKNOWN",
    _CONTROL: "CONTROL",
    _USER_DEFINED: "USER_DEFINED",
    _UNUSED: "UNUSED",
    _BYTE: "BYTE",
}

_BYTES_WITH_REGEX = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_BYTES_ALONE = _BYTES_WITH_REGEX | {"use_regex": False}
_SINGLE_DIGITS = {"type": "Digits", "individual_digits": True}
# Llama 3's, as its tokenizer.json has it.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before merges, by `tokenizer.ggml.pre`.
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES_WITH_REGEX],
    **dict.fromkeys(("smollm", "starcoder", "refact"), [_SINGLE_DIGITS, _BYTES_WITH_REGEX]),
    "llama-bpe": [
        {
            "type": "Split",
            "pattern": {"Regex": _LLAMA3_PATTERN},
            "behavior": "Isolated",
            "invert": False,
        },
        _BYTES_ALONE,
    ],
}
# Where a file does not say whether texts begin with bos: those that do.
_WITH_BOS = ("llama-bpe", "default")


def read(metadata: Mapping[str, Any]) -> tokenizer_lib.Tokenizer:
    """Returns the tokenizer of a file.

    Raises:
      errors.UserError: it has none, or one of a kind that is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise errors.UserError(
            f"tokenizer.ggml.model = {kind!r} (llm_jax reads 'gpt2' and 'llama'); give"
            f" --tokenizer={tokenizer_files.NONE} for ids alone"
        )
    pre = metadata.get("tokenizer.ggml.pre", "default" if kind == "llama" else None)
    has_bos = metadata.get("tokenizer.ggml.add_bos_token", pre in _WITH_BOS)
    if kind == "gpt2" and pre not in _PRE_TOKENIZERS:
        raise errors.UserError(
            f"tokenizer.ggml.pre = {pre!r} (llm_jax knows how {', '.join(_PRE_TOKENIZERS)} cut text); give"
            f" --tokenizer={tokenizer_files.NONE} for ids alone"
        )
    needed = ["eos_token_id", "tokens", "token_type", "merges" if kind == "gpt2" else "scores"]
    missing = [name for name in needed if metadata.get(f"tokenizer.ggml.{name}") is None]
    if missing:
        raise errors.UserError(f"tokenizer.ggml lacks {', '.join(missing)}")
    if has_bos and kind == "gpt2" and metadata.get("tokenizer.ggml.bos_token_id") is None:
        raise errors.UserError("tokenizer.ggml.bos_token_id is missing, with which texts begin")
    if kind == "llama":
        return _sentencepiece(metadata, has_bos)
    return _byte_level(metadata, _PRE_TOKENIZERS[pre], has_bos)


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Returns what a `config.json` says of a tokenizer."""
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in keys.items()}
    return {key: value for key, value in ids.items() if value is not None}


def files(metadata: Mapping[str, Any], tokenizer: tokenizer_lib.Tokenizer) -> tokenizer_files.Files:
    """Returns the files that a Hugging Face folder would have beside the tokenizer itself."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = special_ids(metadata)
    is_bpe = isinstance(tokenizer, tokenizer_kinds.HuggingFace)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if is_bpe else "LlamaTokenizer",
        "add_bos_token": tokenizer.bos_id is not None,
        **{key.removesuffix("_id"): tokens[i] for key, i in ids.items()},
    }
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    return {"tokenizer_config.json": {"text": text}}


def _byte_level(
    metadata: Mapping[str, Any], pre_tokenizers: list[dict[str, Any]], has_bos: bool
) -> tokenizer_kinds.HuggingFace:
    tokens, kinds = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    added = [
        {"id": i, "content": tokens[i], "special": kind == _CONTROL}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, kind in enumerate(kinds)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    bos_id = metadata.get("tokenizer.ggml.bos_token_id") if has_bos else None
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "post_processor": _template(tokens[bos_id], bos_id) if has_bos else None,
        "decoder": _BYTES_WITH_REGEX,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": metadata.get("tokenizer.ggml.pre") == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }
    eos_id = metadata["tokenizer.ggml.eos_token_id"]
    pad_id = metadata.get("tokenizer.ggml.padding_token_id", eos_id)
    return tokenizer_kinds.HuggingFace(definition, eos_id, pad_id, bos_id)


def _template(bos: str, bos_id: int) -> dict[str, Any]:
    """Returns what puts bos before a text, and before each of two."""

    def special(type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": bos, "type_id": type_id}}

    def text(name: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    return {
        "type": "TemplateProcessing",
        "single": [special(0), text("A", 0)],
        "pair": [special(0), text("A", 0), special(1), text("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _sentencepiece(metadata: Mapping[str, Any], has_bos: bool) -> tokenizer_kinds.SentencePiece:
    """Returns the SentencePiece model that the file was made of, as far as it matters."""
    proto = sentencepiece_model_pb2.ModelProto()
    keys = ("tokens", "scores", "token_type")
    for token, score, kind in zip(
        *(metadata[f"tokenizer.ggml.{key}"] for key in keys), strict=True
    ):
        piece = proto.pieces.add(piece=token, score=score)
        if kind in _PIECE_TYPES:
            piece.type = sentencepiece_model_pb2.ModelProto.SentencePiece.Type.Value(
                _PIECE_TYPES[kind]
            )
    trainer = proto.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.ModelType.Value("BPE")
    trainer.byte_fallback = True
    trainer.vocab_size = len(proto.pieces)
    names = {"bos": 1, "eos": 2, "unknown": 0, "padding": -1}
    ids = {k: metadata.get(f"tokenizer.ggml.{k}_token_id", i) for k, i in names.items()}
    trainer.bos_id, trainer.eos_id = ids["bos"], ids["eos"]
    trainer.unk_id, trainer.pad_id = ids["unknown"], ids["padding"]
    # The library finds these by their spelling.
    trainer.bos_piece, trainer.eos_piece = (proto.pieces[ids[k]].piece for k in ("bos", "eos"))
    trainer.unk_piece = proto.pieces[ids["unknown"]].piece
    if ids["padding"] >= 0:
        trainer.pad_piece = proto.pieces[ids["padding"]].piece
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    proto.normalizer_spec.remove_extra_whitespaces = metadata.get(
        "tokenizer.ggml.remove_extra_whitespaces", False
    )
    proto.normalizer_spec.escape_whitespaces = True
    model = proto.SerializeToString()
    try:
        sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise errors.UserError(f"tokenizer.ggml is no SentencePiece model: {error}") from error
    return tokenizer_kinds.SentencePiece(model, has_bos=has_bos)
