"""The kinds of tokenizers; `tokenizer` makes them."""

import base64
from collections.abc import Sequence
import functools
import itertools
import json
import os
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_pb2
import tokenizers

from llm_jax import errors
from llm_jax.data import text_stream as text_stream_lib
from llm_jax.data import tokenizer_base
from llm_jax.data import words

# A document longer than this is tokenised in pieces, where that changes nothing: the library keeps
# some 100 bytes a token, and works on one document in one thread.
_PIECE_CHARS = 1 << 16


class Bytes(tokenizer_base.Tokenizer):
    """The 256 bytes of UTF-8; NUL, which text has no use for, is eos."""

    kind = "bytes"
    eos_id = 0
    pad_id = 0

    def __init__(self, added: Sequence[str] = ()):
        """Args: names of the special tokens behind the bytes."""
        self._added = tuple(added)

    @property
    def vocab_size(self) -> int:
        return 256 + len(self._added)

    @property
    def special_tokens(self) -> dict[str, int]:
        return {"<eos>": self.eos_id} | {name: 256 + i for i, name in enumerate(self._added)}

    def extended(self, names: Sequence[str]) -> "Bytes":
        return Bytes((*self._added, *names))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind} | _added_entry(self._added)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Bytes":
        return cls(raw.get("added", ()))

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

    def _bytes_of(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else self._added[token_id - 256].encode()

    def _edges_of(self, token_id: int) -> tuple[int, int]:
        return words.edges(chr(token_id))

    def _places(self, text: str) -> list[tuple[int, int]]:
        return [(i, i + 1) for i, char in enumerate(text) for _ in char.encode()]

    def _decode(self, ids: list[int]) -> str:
        return b"".join(map(self._bytes_of, ids)).decode("utf-8", "replace")

    def text_stream(self) -> text_stream_lib.TextStream:
        return text_stream_lib.ByteStream(self._bytes_of)


class HuggingFace(tokenizer_base.Tokenizer):
    """A tokenizer of the `tokenizers` library: whatever a `tokenizer.json` describes."""

    kind = "huggingface"

    def __init__(
        self, definition: dict[str, Any], eos_id: int, pad_id: int, bos_id: int | None = None
    ):
        """Args: the content of a tokenizer.json, and the ids."""
        self._definition = definition
        self._eos_id = eos_id
        self._pad_id = pad_id
        self._bos_id = bos_id
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

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        added = self._definition.get("added_tokens") or ()
        return {token["content"]: int(token["id"]) for token in added if token["special"]}

    def extended(self, names: Sequence[str]) -> "HuggingFace":
        added = [
            {"id": self.vocab_size + i, "content": name, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, name in enumerate(names)
        ]
        tokens = [*(self._definition.get("added_tokens") or ()), *added]
        definition = self._definition | {"added_tokens": tokens}
        return HuggingFace(definition, self.eos_id, self.pad_id, self._bos_id)

    @property
    def bos_id(self) -> int | None:
        return self._bos_id

    def token(self, token_id: int) -> str:
        """Returns how the vocabulary spells an id."""
        return self._tokenizer.id_to_token(token_id)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "tokenizer": self._definition,
            "eos_id": self._eos_id,
            "pad_id": self._pad_id,
        } | ({} if self._bos_id is None else {"bos_id": self._bos_id})

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "HuggingFace":
        return cls(raw["tokenizer"], raw["eos_id"], raw["pad_id"], raw.get("bos_id"))

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

    def _edges_of(self, token_id: int) -> tuple[int, int]:
        if self._is_byte_level:
            return words.edges(self._bytes_of[token_id].decode("latin-1"))
        token = self._tokenizer.id_to_token(token_id) or ""
        model = self._definition["model"]
        if model.get("type") != "WordPiece":
            return words.edges(text_stream_lib.unescaped(token))
        # Spaces are gone, but what begins no word has a prefix.
        is_inside = token.startswith(model["continuing_subword_prefix"])
        return (words.LETTER if is_inside else words.SPACE), words.LETTER

    def _places(self, text: str) -> list[tuple[int, int]]:
        return self._tokenizer.encode(text, add_special_tokens=False).offsets

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


class SentencePiece(tokenizer_base.Tokenizer):
    """A SentencePiece model."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, added: Sequence[str] = (), has_bos: bool = False):
        """Args: the content of a `.model` file, which has an eos (checked by `load`); names of the
        special tokens behind its pieces; whether its bos begins every text."""
        self._model = model
        self._added = tuple(added)
        self._has_bos = has_bos
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._num_pieces = self._processor.vocab_size()

    @property
    def vocab_size(self) -> int:
        return self._num_pieces + len(self._added)

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    @property
    def pad_id(self) -> int:
        pad_id = self._processor.pad_id()
        return pad_id if pad_id >= 0 else self.eos_id

    @property
    def bos_id(self) -> int | None:
        bos_id = self._processor.bos_id()
        return bos_id if self._has_bos and bos_id >= 0 else None

    def with_bos(self) -> "SentencePiece":
        """Returns the tokenizer of a model whose texts begin with bos."""
        return SentencePiece(self._model, self._added, has_bos=True)

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        of = self._processor
        ids = [i for i in range(self._num_pieces) if of.is_control(i) or of.is_unknown(i)]
        return {self._piece_of(i): i for i in (*ids, *range(self._num_pieces, self.vocab_size))}

    def extended(self, names: Sequence[str]) -> "SentencePiece":
        return SentencePiece(self._model, (*self._added, *names), self._has_bos)

    def to_dict(self) -> dict[str, Any]:
        model = base64.b64encode(self._model).decode("ascii")
        has_bos = {"has_bos": True} if self._has_bos else {}
        return {"kind": self.kind, "model": model} | _added_entry(self._added) | has_bos

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "SentencePiece":
        model = base64.b64decode(raw["model"])
        return cls(model, raw.get("added", ()), raw.get("has_bos", False))

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        threads = min(len(texts), os.cpu_count() or 1)
        encoded = self._processor.encode(list(texts), num_threads=max(1, threads))
        return [np.array(ids, np.int32) for ids in encoded]

    def _piece_of(self, token_id: int) -> str:
        behind = token_id - self._num_pieces
        return self._added[behind] if behind >= 0 else self._processor.id_to_piece(token_id)

    def _edges_of(self, token_id: int) -> tuple[int, int]:
        return words.edges(text_stream_lib.unescaped(self._piece_of(token_id)))

    def _places(self, text: str) -> list[tuple[int, int]]:
        # Objects with places changed their name between versions; the message has not changed.
        raw = self._processor.encode(text, out_type="serialized_proto")
        char_of = [i for i, char in enumerate(text) for _ in char.encode()] + [len(text)]
        pieces = sentencepiece_pb2.SentencePieceText.FromString(raw).pieces
        return [(char_of[piece.begin], char_of[piece.end]) for piece in pieces]

    def _decode(self, ids: list[int]) -> str:
        runs = itertools.groupby(ids, lambda token_id: token_id >= self._num_pieces)
        return "".join(
            "".join(map(self._piece_of, run)) if is_added else self._processor.decode(list(run))
            for is_added, run in runs
        )

    def text_stream(self) -> text_stream_lib.TextStream:
        return text_stream_lib.PieceStream(self._decode, self._piece_of)


def _added_entry(added: Sequence[str]) -> dict[str, list[str]]:
    """Returns what `to_dict` says of added tokens: nothing if there are none, as it always did."""
    return {"added": list(added)} if added else {}


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
