"""A tokenizer that has none: text is the ids themselves, for models that came without one."""

from collections.abc import Sequence
import re
from typing import Any

import numpy as np

from llm_jax import errors
from llm_jax.data import text_stream as text_stream_lib
from llm_jax.data import tokenizer_base
from llm_jax.data import words


class TokenIds(tokenizer_base.Tokenizer):
    """Text such as `504 3575 282`, a number for each token."""

    kind = "ids"

    def __init__(self, vocab_size: int, eos_id: int, pad_id: int):
        self._vocab_size, self._eos_id, self._pad_id = vocab_size, eos_id, pad_id

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def eos_id(self) -> int:
        return self._eos_id

    @property
    def pad_id(self) -> int:
        return self._pad_id

    @property
    def special_tokens(self) -> dict[str, int]:
        known = {"pad": self._pad_id, "eos": self._eos_id}
        return {name: token_id for name, token_id in known.items() if token_id >= 0}

    def extended(self, names: Sequence[str]) -> "TokenIds":
        return TokenIds(self._vocab_size + len(names), self._eos_id, self._pad_id)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "vocab_size": self._vocab_size,
            "eos_id": self._eos_id,
            "pad_id": self._pad_id,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "TokenIds":
        return cls(raw["vocab_size"], raw["eos_id"], raw["pad_id"])

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array([self._id(word) for word in text.split()], np.int32) for text in texts]

    def _id(self, word: str) -> int:
        if not (word.isascii() and word.isdigit()):
            raise errors.UserError(
                f"{word!r} is no token id: the model came without a tokenizer, so its texts are ids such"
                " as '504 3575 282'"
            )
        return self.check_id(int(word))

    def _edges_of(self, token_id: int) -> tuple[int, int]:
        return words.SPACE, words.LETTER  # each a word of its own

    def _places(self, text: str) -> list[tuple[int, int]]:
        return [found.span() for found in re.finditer(r"\S+", text)]

    def _decode(self, ids: list[int]) -> str:
        return "".join(map(self._piece, ids))

    def _piece(self, token_id: int) -> str:
        # The space stands before each number, so that pieces can be joined.
        return f" {token_id}"

    def text_stream(self) -> text_stream_lib.TextStream:
        return text_stream_lib.ByteStream(lambda token_id: self._piece(token_id).encode())
