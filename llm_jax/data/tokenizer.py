"""Tokenizers behind one interface, each rebuilt from a JSON-able dict alone.

    tokenizer = tokenizer.load("bpe:gpt2/")             # or bytes, sentencepiece:PATH
    tokenizer = tokenizer.make("train_bpe:8192", documents_fn)
    tokenizer.from_dict(tokenizer.to_dict())            # what a checkpoint keeps

Text is always plain text here: a document that spells `<|endoftext|>` never becomes the eos token.
"""

from collections.abc import Callable
from collections.abc import Iterable
import pathlib
from typing import Any

from llm_jax import errors
from llm_jax.data import bpe
from llm_jax.data import token_ids
from llm_jax.data import tokenizer_base
from llm_jax.data import tokenizer_kinds

SPECS = ("bytes", "bpe:PATH", "train_bpe:VOCAB_SIZE", "sentencepiece:PATH", "workdir:PATH")

# The interface, and what `train_bpe:` specs do, under the names that callers know.
Tokenizer = tokenizer_base.Tokenizer
SENTINEL = tokenizer_base.SENTINEL
train_bpe = bpe.train


class StreamDecoder:
    """Decodes tokens one by one: what it has returned so far never changes.

    The pieces joined, with `flush` at the end, are `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stream = tokenizer.text_stream()

    def feed(self, token_id: int) -> str:
        """Takes one id and returns the text that became final by it (often none)."""
        return self._stream.feed(self._tokenizer.check_id(token_id))

    def flush(self) -> str:
        """Returns what was held back, at the end of the ids, and starts anew."""
        rest = self._stream.flush()
        self._stream = self._tokenizer.text_stream()
        return rest


_KINDS = {
    kind.kind: kind
    for kind in (
        tokenizer_kinds.Bytes,
        tokenizer_kinds.HuggingFace,
        tokenizer_kinds.SentencePiece,
        token_ids.TokenIds,
    )
}


def from_dict(raw: dict[str, Any]) -> Tokenizer:
    """Rebuilds a tokenizer from its `to_dict`.

    Raises:
      errors.UserError: a kind that this version does not know.
    """
    if raw.get("kind") not in _KINDS:
        raise errors.UserError(
            f"tokenizer kind {raw.get('kind')!r} is not known: use one of {', '.join(_KINDS)}"
        )
    return _KINDS[raw["kind"]].from_dict(raw)


def load(spec: str) -> Tokenizer:
    """Returns the tokenizer of a `data.tokenizer` spec that needs no documents.

    Raises:
      errors.UserError: a spec that is not known, a missing or broken file, or train_bpe, whose
        tokenizer is trained by `make`.
    """
    kind, _, argument = spec.partition(":")
    if kind == "bytes" and not argument:
        return tokenizer_kinds.Bytes()
    if kind == "bpe" and argument:
        return bpe.load(pathlib.Path(argument).expanduser())
    if kind == "sentencepiece" and argument:
        return _load_sentencepiece(pathlib.Path(argument).expanduser())
    if kind == "workdir" and argument:
        return _of_workdir(argument)
    if kind == "train_bpe":
        trained_size(spec)
        raise errors.UserError(
            f"data.tokenizer = {spec!r} is trained on the documents: run"
            " `python -m llm_jax.prepare --config=...` first"
        )
    hint = errors.nearest(kind, [s.partition(":")[0] for s in SPECS])
    raise errors.UserError(f"data.tokenizer = {spec!r} is not known: use {', '.join(SPECS)}{hint}")


def make(spec: str, documents_fn: Callable[[], Iterable[str]]) -> Tokenizer:
    """Returns the tokenizer of any spec; `documents_fn` gives the train split, if it is needed."""
    size = trained_size(spec)
    return load(spec) if size is None else train_bpe(documents_fn(), size)


def trained_size(spec: str) -> int | None:
    """Returns N of `train_bpe:N`, None for other specs; UserError if it is no size."""
    kind, _, argument = spec.partition(":")
    if kind != "train_bpe":
        return None
    if not (argument.isascii() and argument.isdigit() and int(argument) >= 257):
        raise errors.UserError(
            f"data.tokenizer = {spec!r}: train_bpe takes a vocabulary size of at least 257"
            " (256 bytes and the end of text), as in train_bpe:8192"
        )
    return int(argument)


def _of_workdir(workdir: str) -> Tokenizer:
    """Returns the tokenizer of a run's newest checkpoint, such as that of a converted model."""
    from llm_jax import checkpoint  # it stands on the models, of which most tokenizers know nothing

    return checkpoint.read_latest(workdir, None, lambda _, meta: from_dict(meta.tokenizer))


def _load_sentencepiece(path: pathlib.Path) -> tokenizer_kinds.SentencePiece:
    try:
        tokenizer = tokenizer_kinds.SentencePiece(path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise errors.UserError(f"data.tokenizer: cannot load {path}: {error}") from error
    if tokenizer.eos_id < 0:
        raise errors.UserError(
            f"data.tokenizer: {path} has no eos piece; train it with eos_id >= 0"
        )
    return tokenizer
