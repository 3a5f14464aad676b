"""Token ids in, text out as soon as it cannot change any more; all of it together equals the text of all tokens.

A step of a service decodes a token of every stream, in the thread that also reads and writes for all: what a token
costs here is what counts. Most tokenizers (byte-level BPE) have bytes for every token, whatever stands next to it;
these are looked up. For the others a window of tokens is decoded again and again.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Any, Protocol


class TextStream(Protocol):
    """The text of one answer."""

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; "" while a character's bytes are incomplete."""
        ...

    def flush(self) -> str:
        """The rest, with replacement characters for bytes that never became a character; then starts over."""
        ...


class Vocabulary:
    """A fast tokenizer's tokens, with what is known of single ones: as many as it has at most."""

    def __init__(self, backend: Any, skipped: frozenset[int], byte_tokens: frozenset[int]) -> None:
        """``skipped`` are left out of text; each of ``byte_tokens`` stands for one raw byte, whose text depends on the
        byte tokens after it."""
        self._backend = backend
        self._skipped = skipped
        self._spelt: dict[int, str] = {}
        self._texts: dict[int, str] = {}
        self.byte_tokens = byte_tokens

    def spelling(self, token_id: int) -> str | None:
        """How the vocabulary spells a token; None for what is left out of text."""
        spelt: str | None = self._spelt.get(token_id)
        if spelt is None and token_id not in self._skipped:
            spelt = self._backend.id_to_token(token_id)
            if spelt is not None:  # of ids that are none there is no end
                self._spelt[token_id] = spelt
        return spelt

    def text(self, token_ids: Sequence[int]) -> str:
        """Of tokens that are not left out: as one text."""
        if len(token_ids) > 1:
            return str(self._backend.decode(token_ids, skip_special_tokens=False))
        found = self._texts.get(token_ids[0])
        if found is None:
            found = self._texts[token_ids[0]] = str(self._backend.decode(token_ids, skip_special_tokens=False))
        return found

    def bytes_of(self, token_id: int) -> bytes:
        """What a token is in the middle of a text, a special token as it is written; b"" for an id that is none."""
        spelt = self.spelling(token_id)
        if spelt is None:
            return b""
        if token_id in self.byte_tokens:
            return bytes([int(spelt[3:-1], 16)])  # <0x0A>
        alone, twice = self.text([token_id]), self.text([token_id, token_id])
        return (twice[len(alone) :] if twice.startswith(alone) else alone).encode()


class NoText:
    """Of a model without a tokenizer."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def _byte_of_character() -> dict[str, int]:
    """How byte-level vocabularies spell bytes: what prints stands for itself, the others for characters from 256 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


class ByteTable(dict[int, str | bytes]):
    """The bytes of every token of a byte-level vocabulary, as text where they are whole characters; filled as used."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self._vocabulary = vocabulary

    def __missing__(self, token_id: int) -> str | bytes:
        token = self._vocabulary.spelling(token_id) or ""
        try:
            spelt = bytes(map(BYTE_OF_CHARACTER.__getitem__, token))
        except KeyError:  # an added token: its text as it is
            spelt = token.encode()
        try:
            found: str | bytes = spelt.decode()
        except UnicodeDecodeError:
            found = spelt
        if token:
            self[token_id] = found
        return found


class ByteStream:
    """The stream of a byte-level vocabulary: bytes one behind the other, read as UTF-8."""

    def __init__(self, table: ByteTable) -> None:
        self._table = table
        self._begun = b""  # of a character

    def push(self, token_id: int) -> str:
        piece = self._table[token_id]
        if not self._begun and type(piece) is str:
            return piece
        new = piece.encode() if isinstance(piece, str) else piece
        joined = self._begun + new
        text, used = utf_8_decode(joined, "replace", False)
        self._begun = joined[used:]
        return text

    def flush(self) -> str:
        begun, self._begun = self._begun, b""
        return begun.decode(errors="replace")


class WindowStream:
    """The stream of any vocabulary.

        tokens      ... a b | c d | e          window = c d e
        text of window  "c d" "e"              sent   = the characters of it that are out already

    The window keeps the last finished group of tokens, because a decoder treats the first token of a text
    (its leading space) in its own way.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._window: list[int] = []
        self._sent = 0
        self._finished = 0  # tokens of the window whose text is all out

    def push(self, token_id: int) -> str:
        if self._vocabulary.spelling(token_id) is None:
            return ""
        self._window.append(token_id)
        if token_id in self._vocabulary.byte_tokens:
            return ""
        text = self._vocabulary.text(self._window)
        # The bytes of one incomplete character decode to one replacement character at the end.
        stable = text.removesuffix("\ufffd")
        delta, self._sent = stable[self._sent :], max(self._sent, len(stable))
        if len(stable) == len(text):
            self._close_group()
        return delta

    def flush(self) -> str:
        text = self._vocabulary.text(self._window) if self._window else ""
        delta = text[self._sent :]
        self._window, self._sent, self._finished = [], 0, 0
        return delta

    def _close_group(self) -> None:
        """Forgets the finished tokens before the last group, if that group has text to stand for a beginning."""
        group = self._window[self._finished :]
        group_text = self._vocabulary.text(group)
        if group_text:
            self._window, self._sent = group, len(group_text)
        self._finished = len(self._window)
