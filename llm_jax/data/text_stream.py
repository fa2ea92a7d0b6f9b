"""Incremental decoding: ids in, the text that no later id can change out."""

import abc
import codecs
from collections.abc import Callable
import functools
import re

# How SentencePiece and byte-fallback vocabularies spell a byte.
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class TextStream(abc.ABC):
    """Decodes a stream of ids."""

    @abc.abstractmethod
    def feed(self, token_id: int) -> str:
        """Takes one id and returns the text that is final with it."""

    @abc.abstractmethod
    def flush(self) -> str:
        """Returns the rest of the text."""


class ByteStream(TextStream):
    """For tokens that are bytes: holds back an unfinished UTF-8 character."""

    def __init__(self, bytes_of: Callable[[int], bytes]):
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class PieceStream(TextStream):
    """For tokens whose texts are joined, but for two things that reach across tokens.

    A run of byte pieces is decoded as one, so it is held back until another piece ends it; and
    spaces are stripped at the very beginning of the text, so text is decoded behind an anchor: a
    token that has already given text.
    """

    def __init__(self, decode: Callable[[list[int]], str], piece_of: Callable[[int], str]):
        self._decode = decode
        self._piece_of = piece_of
        self._anchor: list[int] = []
        self._anchor_text = ""
        self._held: list[int] = []

    def feed(self, token_id: int) -> str:
        self._held.append(token_id)
        if _BYTE_PIECE.fullmatch(self._piece_of(token_id)):
            return ""
        new = self._new_text()
        if not new and not self._anchor:
            return ""  # nothing but stripped spaces and control tokens so far: the beginning holds
        text = self._decode([token_id])
        if text:
            self._anchor, self._anchor_text = [token_id], text
        elif not self._anchor:
            self._anchor, self._anchor_text = self._held, new
        self._held = []
        return new

    def flush(self) -> str:
        return self._new_text()

    def _new_text(self) -> str:
        return self._decode(self._anchor + self._held)[len(self._anchor_text) :]


class WholeText(TextStream):
    """For decoders that rewrite text across tokens (WordPiece's clean-up): all comes at the end."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._ids: list[int] = []

    def feed(self, token_id: int) -> str:
        self._ids.append(token_id)
        return ""

    def flush(self) -> str:
        return self._decode(self._ids)


@functools.cache
def byte_of_char() -> dict[str, int]:
    """Returns GPT-2's alphabet: printable bytes are themselves, the others follow from U+0100.

    As `bytes_to_unicode` in https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def unescaped(piece: str) -> str:
    """Returns the text of a SentencePiece piece: spaces and bytes (as Latin-1) for their escapes."""
    if _BYTE_PIECE.fullmatch(piece):
        return chr(int(piece[3:5], 16))
    return piece.replace("\u2581", " ")
