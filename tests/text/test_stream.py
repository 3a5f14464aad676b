"""Streams: whatever the tokens, all text together equals decoding them at once, and a token costs little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.tokenizer_for_tests import byte_level_tokenizer, sentencepiece_like
from text.codec import TextCodec
from text.stream import BYTE_OF_CHARACTER, ByteStream, ByteTable, Vocabulary, WindowStream

BYTE_LEVEL = TextCodec(byte_level_tokenizer(), "byte level")
PIECES = TextCodec(sentencepiece_like(), "pieces")


def streamed(codec: TextCodec, ids: list[int], keep_special: bool) -> str:
    stream = codec.stream(keep_special)
    return "".join([*(stream.push(token) for token in ids), stream.flush()])


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 400), max_size=24), keep=st.booleans())
def test_stream_equals_decode_byte_level(ids: list[int], keep: bool) -> None:
    assert streamed(BYTE_LEVEL, ids, keep) == BYTE_LEVEL.decode(ids, keep)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 270), max_size=24), keep=st.booleans())
def test_stream_equals_decode_pieces(ids: list[int], keep: bool) -> None:
    assert streamed(PIECES, ids, keep) == PIECES.decode(ids, keep)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20))
def test_text_survives_and_never_shows_half_a_character(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    stream = BYTE_LEVEL.stream(keep_special=True)
    deltas = [stream.push(token) for token in ids]
    assert BYTE_LEVEL.decode(ids, keep_special=True) == text
    assert "".join([*deltas, stream.flush()]) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in delta for delta in deltas)


def test_characters_come_when_their_last_byte_does() -> None:
    ids = BYTE_LEVEL.encode("€")
    assert len(ids) == 3
    stream = BYTE_LEVEL.stream()
    assert [stream.push(token) for token in ids] == ["", "", "€"]


def test_a_long_stream_is_not_decoded_from_its_beginning() -> None:
    decoded: list[int] = []

    class Counting(Vocabulary):
        def text(self, token_ids: Sequence[int]) -> str:
            decoded.append(len(token_ids))
            return super().text(token_ids)

    for tokenizer in (byte_level_tokenizer(), sentencepiece_like()):
        backend, decoded[:] = tokenizer.backend_tokenizer, []
        stream = WindowStream(Counting(backend, frozenset(), frozenset()))
        ids = backend.encode("a stone b " * 200).ids
        assert "".join(map(stream.push, ids)) + stream.flush() == backend.decode(ids)
        assert 0 < max(decoded) <= 8


def test_a_token_is_looked_up_once_and_bytes_are_not_decoded_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step has a token for each of many streams: what was found out about a token is kept."""
    asked: list[str] = []

    class Backend:
        def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
            self._backend = tokenizer.backend_tokenizer

        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(self._backend, name)

    for codec, tokenizer in ((BYTE_LEVEL, byte_level_tokenizer()), (PIECES, sentencepiece_like())):
        ids = codec.encode("a stone" * 50)
        vocabulary = Vocabulary(Backend(tokenizer), frozenset(), frozenset())
        table, windows = ByteStream(ByteTable(vocabulary)), WindowStream(vocabulary)
        asked.clear()
        if codec is BYTE_LEVEL:
            assert "".join(map(table.push, ids)) == codec.decode(ids) and asked.count("decode") == 0
        else:
            assert "".join(map(windows.push, ids)) + windows.flush() == codec.decode(ids)
        assert asked.count("id_to_token") == len(set(ids)) < len(ids)
        assert asked.count("decode") <= len(ids) + len(set(ids))


def test_ids_that_no_token_has_are_not_remembered() -> None:
    for codec in (BYTE_LEVEL, PIECES):
        for stream in (codec.stream(), codec.stream(keep_special=True)):
            assert "".join(stream.push(token) for token in range(500, 700)) == ""
        assert not any(len(known) > 400 for known in codec._byte_tables.values())


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.binary(min_size=1, max_size=3), max_size=16))
def test_any_bytes_become_the_text_that_the_tokenizer_makes_of_them(pieces: list[bytes]) -> None:
    """Bytes that are no characters too: cut short, overlong, surrogates."""
    byte = {byte: BYTE_LEVEL._backend.token_to_id(spelt) for spelt, byte in BYTE_OF_CHARACTER.items()}
    ids = [byte[value] for piece in pieces for value in piece]
    assert streamed(BYTE_LEVEL, ids, False) == BYTE_LEVEL.decode(ids)
