"""The kinds of tokenizers and the interface that they share; `tokenizer` makes them."""

import abc
import base64
from collections.abc import Iterable
from collections.abc import Sequence
import functools
import hashlib
import json
import os
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from llm_jax import errors
from llm_jax.data import text_stream as text_stream_lib

# A document longer than this is tokenised in pieces, where that changes nothing: the library keeps
# some 100 bytes a token, and works on one document in one thread.
_PIECE_CHARS = 1 << 16


class Tokenizer(abc.ABC):
    """Text to token ids and back."""

    kind: str  # the key by which `from_dict` finds the class

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size)."""

    @property
    @abc.abstractmethod
    def eos_id(self) -> int:
        """The id that ends a document; `encode` never returns it."""

    @property
    @abc.abstractmethod
    def pad_id(self) -> int:
        """The id that fills up rows; `eos_id` where the vocabulary has none of its own."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Returns everything `from_dict` needs, JSON-able."""

    @abc.abstractmethod
    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes valid text."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Decodes ids of the vocabulary."""

    @abc.abstractmethod
    def text_stream(self) -> text_stream_lib.TextStream:
        """Returns a new incremental decoder, which agrees with `decode`."""

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32 [num_tokens], with no eos; raises as encode_batch."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes several texts at once, in threads where the library has them.

        Raises:
          errors.UserError: a text that UTF-8 cannot express, or that this tokenizer refuses.
        """
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                around = text[max(0, error.start - 10) : error.end + 10]
                raise errors.UserError(
                    f"text holds half of a surrogate pair at character {error.start}:"
                    f" {around!r}; UTF-8 has no such character: remove it from the text"
                ) from error
        return self._encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
          errors.UserError: an id outside of the vocabulary.
        """
        ids = [self.check_id(i) for i in ids]
        return self._decode(ids)

    def check_id(self, token_id: int) -> int:
        """Returns the id as an int; UserError if the vocabulary does not have it."""
        token_id = int(token_id)
        if not 0 <= token_id < self.vocab_size:
            raise errors.UserError(
                f"token id {token_id} is outside of the vocabulary of {self.vocab_size} tokens"
            )
        return token_id

    def fingerprint(self) -> str:
        """Returns the sha256 (hex) of `to_dict`: equal for tokenizers that are equal."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        text = json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Bytes(Tokenizer):
    """The 256 bytes of UTF-8; NUL, which text has no use for, is eos."""

    kind = "bytes"
    vocab_size = 256
    eos_id = 0
    pad_id = 0

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Bytes":
        del raw
        return cls()

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        result = []
        for text in texts:
            position = text.find("\0")
            if position >= 0:
                around = text[max(0, position - 20) : position + 20]
                raise errors.UserError(
                    f"text holds the NUL character at character {position}: {around!r}. The bytes"
                    " tokenizer ends documents with it: remove it, or use another data.tokenizer"
                )
            result.append(np.frombuffer(text.encode(), np.uint8).astype(np.int32))
        return result

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def text_stream(self) -> text_stream_lib.TextStream:
        return text_stream_lib.ByteStream(lambda token_id: bytes([token_id]))


class HuggingFace(Tokenizer):
    """A tokenizer of the `tokenizers` library: whatever a `tokenizer.json` describes."""

    kind = "huggingface"

    def __init__(self, definition: dict[str, Any], eos_id: int, pad_id: int):
        """Args: the content of a tokenizer.json, and the two ids."""
        self._definition = definition
        self._eos_id = eos_id
        self._pad_id = pad_id
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Special tokens that are spelled out in a text are text.
        self._tokenizer.encode_special_tokens = True
        # Not get_vocab_size(), a count: ids may have gaps.
        self._vocab_size = 1 + max(self._tokenizer.get_vocab().values())
        self._is_byte_level = (definition.get("decoder") or {}).get("type") == "ByteLevel"
        self._splits_at_spaces = _splits_at_spaces(definition)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def eos_id(self) -> int:
        return self._eos_id

    @property
    def pad_id(self) -> int:
        return self._pad_id

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "tokenizer": self._definition,
            "eos_id": self._eos_id,
            "pad_id": self._pad_id,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "HuggingFace":
        return cls(raw["tokenizer"], raw["eos_id"], raw["pad_id"])

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        split = [self._pieces(text) for text in texts]
        flat = [piece for pieces in split for piece in pieces]
        encoded = self._tokenizer.encode_batch_fast(flat, add_special_tokens=False)
        arrays = iter([np.array(e.ids, np.int32) for e in encoded])
        return [np.concatenate([next(arrays) for _ in pieces]) for pieces in split]

    def _pieces(self, text: str) -> list[str]:
        """Cuts a long text where its tokens have a boundary in any case."""
        if not self._splits_at_spaces:
            return [text]
        pieces, start = [], 0
        while len(text) - start > _PIECE_CHARS:
            cut = _boundary(text, start + _PIECE_CHARS)
            if cut is None:
                break
            pieces.append(text[start:cut])
            start = cut
        return [*pieces, text[start:]]

    @functools.cached_property
    def _bytes_of(self) -> list[bytes]:
        """The bytes of each id of a byte-level vocabulary."""
        added = {int(t["id"]) for t in self._definition.get("added_tokens") or ()}
        table = text_stream_lib.byte_of_char()
        result = []
        for token_id in range(self.vocab_size):
            token = self._tokenizer.id_to_token(token_id) or ""
            if token_id in added or not all(char in table for char in token):
                result.append(token.encode())
            else:
                result.append(bytes(table[char] for char in token))
        return result

    def _decode(self, ids: list[int]) -> str:
        if self._is_byte_level:
            return b"".join(self._bytes_of[i] for i in ids).decode("utf-8", "replace")
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def text_stream(self) -> text_stream_lib.TextStream:
        if self._is_byte_level:
            return text_stream_lib.ByteStream(self._bytes_of.__getitem__)
        if not _decodes_piece_by_piece(self._definition.get("decoder")):
            return text_stream_lib.WholeText(self._decode)
        return text_stream_lib.PieceStream(
            self._decode, lambda i: self._tokenizer.id_to_token(i) or ""
        )


class SentencePiece(Tokenizer):
    """A SentencePiece model."""

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        """Args: the content of a `.model` file, which has an eos (checked by `load`)."""
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    @property
    def pad_id(self) -> int:
        pad_id = self._processor.pad_id()
        return pad_id if pad_id >= 0 else self.eos_id

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "model": base64.b64encode(self._model).decode("ascii")}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "SentencePiece":
        return cls(base64.b64decode(raw["model"]))

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        threads = min(len(texts), os.cpu_count() or 1)
        encoded = self._processor.encode(list(texts), num_threads=max(1, threads))
        return [np.array(ids, np.int32) for ids in encoded]

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def text_stream(self) -> text_stream_lib.TextStream:
        return text_stream_lib.PieceStream(self._decode, self._processor.id_to_piece)


def _splits_at_spaces(definition: dict[str, Any]) -> bool:
    """Returns whether text may be cut before a space that follows a non-space.

    True of GPT-2's pre-tokenisation: in its pattern spaces only begin tokens or follow spaces.
    Others may differ, and a token of their own (added, not special) may hold spaces.
    """
    before = definition.get("pre_tokenizer") or {}
    return (
        before.get("type") == "ByteLevel"
        and before.get("use_regex", True)
        and not before.get("add_prefix_space", True)
        and definition.get("normalizer") is None
        and all(token["special"] for token in definition.get("added_tokens") or ())
    )


def _boundary(text: str, start: int) -> int | None:
    """Returns the first index from `start` on of a space behind a non-space."""
    position = text.find(" ", start)
    while position > 0:
        if not text[position - 1].isspace():
            return position
        position = text.find(" ", position + 1)
    return None


def _decodes_piece_by_piece(decoder: dict[str, Any] | None) -> bool:
    """Returns whether the decoder of a tokenizer.json joins texts of single tokens (Llama's do)."""
    if decoder is None:
        return False
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return all(
        s["type"] in ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace") for s in steps
    )
