"""The interface that all tokenizers share."""

import abc
from collections.abc import Iterable
from collections.abc import Sequence
import functools
import hashlib
import json
from typing import Any

import numpy as np

from llm_jax import errors
from llm_jax.data import text_stream as text_stream_lib
from llm_jax.data import words

# T5's names of what stands for a span that was taken out.
SENTINEL = "<extra_id_{}>"


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

    @property
    def bos_id(self) -> int | None:
        """The id that every text began with in training; None: there was none, as here."""
        return None

    @property
    @abc.abstractmethod
    def special_tokens(self) -> dict[str, int]:
        """Ids that stand for no text, by their names; `encode` never returns them but for unknown."""

    @abc.abstractmethod
    def extended(self, names: Sequence[str]) -> "Tokenizer":
        """Returns this tokenizer with more special tokens, of the ids from `vocab_size` on.

        Text has the ids that it had, so what was tokenised before and models of a vocabulary that is
        large enough stay valid; and `to_dict` without such tokens is what it was before they existed.
        """

    @abc.abstractmethod
    def _edges_of(self, token_id: int) -> tuple[int, int]:
        """Returns the kinds, as of `words`, of the first and last character of an ordinary token."""

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

    @abc.abstractmethod
    def _places(self, text: str) -> list[tuple[int, int]]:
        """Returns the characters [start, end) that each token of a valid text is made of."""

    def encode_with_places(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of a text, int32 [T], and the characters that each is of, int64 [T, 2].

        Characters are [start, end). Tokens may share one, or have none. Raises as `encode_batch`.
        """
        ids = self.encode(text)
        return ids, np.array(self._places(text), np.int64).reshape(len(ids), 2)

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

    @property
    def mask_id(self) -> int | None:
        """The id that hides a token in masked language modelling, if there is one."""
        return self._special_id("<mask>", "[MASK]")

    @property
    def cls_id(self) -> int | None:
        """The id that an encoder's rows begin with, if there is one."""
        return self._special_id("<cls>", "[CLS]", "<s>")

    @property
    def sep_id(self) -> int:
        """The id that ends each text of a pair; `eos_id` where there is none of its own."""
        found = self._special_id("<sep>", "[SEP]", "</s>")
        return self.eos_id if found is None else found

    @property
    def sentinel_ids(self) -> list[int]:
        """The ids of T5's `<extra_id_0>`, `<extra_id_1>` and so on, as far as they go."""
        special, result = self.special_tokens, []
        while (name := SENTINEL.format(len(result))) in special:
            result.append(special[name])
        return result

    def _special_id(self, *names: str) -> int | None:
        special = self.special_tokens
        return next((special[name] for name in names if name in special), None)

    @functools.cached_property
    def is_special_V(self) -> np.ndarray:
        """Which ids are special tokens, bool [vocab_size]."""
        result = np.zeros(self.vocab_size, bool)
        result[list({self.eos_id, self.pad_id, *self.special_tokens.values()})] = True
        return result

    def word_starts(self, ids: np.ndarray) -> np.ndarray:
        """Returns at which tokens a word begins, bool, of ids [..., T].

        A word is a run of letters and digits, or of other marks, with the space before it, as in
        GPT-2's pre-tokenisation; bytes beyond ASCII count as letters. Special tokens are words.
        """
        first, last = self._edges
        first_T, last_T = first[ids], last[ids]
        before_T = np.roll(last_T, 1, axis=-1)
        follows_T = (first_T == before_T) | (before_T == words.SPACE)
        starts_T = ~(follows_T & (first_T != words.SPACE)) | (first_T == words.BREAK)
        starts_T[..., :1] = True
        return starts_T

    @functools.cached_property
    def _edges(self) -> tuple[np.ndarray, np.ndarray]:
        """The kinds of the first and the last character of each token, uint8 [vocab_size]."""
        special = self.is_special_V
        edges = [
            (words.BREAK, words.BREAK) if special[i] else self._edges_of(i)
            for i in range(self.vocab_size)
        ]
        first, last = np.array(edges, np.uint8).T
        return first, last

    def fingerprint(self) -> str:
        """Returns the sha256 (hex) of `to_dict`: equal for tokenizers that are equal."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        text = json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()
