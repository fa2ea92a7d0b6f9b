"""Byte-level BPE: trained on documents, or loaded from the files of published models."""

from collections.abc import Iterable
import json
import pathlib
from typing import Any

import tokenizers

from llm_jax import errors
from llm_jax.data import tokenizer_kinds

END_OF_TEXT = "<|endoftext|>"
# Names under which published vocabularies keep their end of text, most usual first.
EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")


def train(documents: Iterable[str], vocab_size: int) -> tokenizer_kinds.HuggingFace:
    """Trains byte-level BPE with GPT-2's pre-tokenisation; the same documents give the same result.

    Args:
      documents: training text.
      vocab_size: tokens at most, at least 257; a small corpus may give fewer.
    """
    tokenizer = _byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    eos_id = tokenizer.token_to_id(END_OF_TEXT)
    return tokenizer_kinds.HuggingFace(json.loads(tokenizer.to_str()), eos_id, eos_id)


def _byte_level(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    """Returns a tokenizer around a BPE model as GPT-2 has it."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise errors.UserError(f"data.tokenizer: cannot read {path}: {error}") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        result = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise errors.UserError(f"data.tokenizer: {path} is not JSON: {error}") from error
    if not isinstance(result, dict):
        raise errors.UserError(f"data.tokenizer: {path} is not a JSON object")
    return result


def load(path: pathlib.Path) -> tokenizer_kinds.HuggingFace:
    """Loads a tokenizer.json, or a directory that has it or GPT-2's pair of files."""
    if path.is_file():
        return _load_tokenizer_json(path)
    if not path.is_dir():
        raise errors.UserError(f"data.tokenizer: {path} does not exist")
    if (path / "tokenizer.json").is_file():
        return _load_tokenizer_json(path / "tokenizer.json")
    for vocabulary, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (path / vocabulary).is_file() and (path / merges).is_file():
            return _load_gpt2(path / vocabulary, path / merges)
    raise errors.UserError(
        f"data.tokenizer: the directory {path} has no tokenizer.json, no encoder.json with"
        " vocab.bpe and no vocab.json with merges.txt"
    )


def _load_gpt2(vocabulary: pathlib.Path, merges: pathlib.Path) -> tokenizer_kinds.HuggingFace:
    ids = _read_json(vocabulary)
    if END_OF_TEXT not in ids:
        raise errors.UserError(f"data.tokenizer: {vocabulary} has no {END_OF_TEXT}")
    pairs = []
    for number, line in enumerate(_read_text(merges).split("\n"), start=1):
        if not line.strip() or line.startswith("#version"):
            continue
        pair = line.split()
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
            raise errors.UserError(
                f"data.tokenizer: {merges}:{number}: {line!r} is not a merge of two tokens of"
                f" {vocabulary}"
            )
        pairs.append(tuple(pair))
    tokenizer = _byte_level(tokenizers.models.BPE(vocab=ids, merges=pairs))
    tokenizer.add_special_tokens([END_OF_TEXT])
    eos_id = ids[END_OF_TEXT]
    return tokenizer_kinds.HuggingFace(json.loads(tokenizer.to_str()), eos_id, eos_id)


def _load_tokenizer_json(path: pathlib.Path) -> tokenizer_kinds.HuggingFace:
    definition = _read_json(path)
    added = definition.get("added_tokens")
    if not isinstance(added, list) or not isinstance(definition.get("model"), dict):
        raise errors.UserError(f"data.tokenizer: {path} is not a tokenizer.json")
    ids = {token["content"]: token["id"] for token in added}
    names = list(EOS_NAMES)
    settings = path.parent / "tokenizer_config.json"
    if settings.is_file():
        named = _read_json(settings).get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        names[:0] = [named] if named else []
    eos_id = next((ids[name] for name in names if name in ids), None)
    if eos_id is None:
        raise errors.UserError(
            f"data.tokenizer: {path} has no end-of-text token; looked for {', '.join(names)}"
            f" among its special tokens ({', '.join(ids) or 'none'})"
        )
    pad_id = next((ids[name] for name in _PAD_NAMES if name in ids), eos_id)
    return tokenizer_kinds.HuggingFace(definition, eos_id, pad_id)
