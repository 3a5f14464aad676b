"""Sizes and counts are checked before a message is made of bytes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import chunks_pb2, decode_pb2, prefill_pb2
from serving.errors import InvalidRequest, TooLarge
from serving.rpc.parsing import FIELDS_MAX, MESSAGE_NBYTES_MAX, message_nbytes_max, parse, text_nbytes_max


def never(kind: Any) -> Any:
    """A message class that nothing may be parsed into."""

    class Unparsed:
        DESCRIPTOR = kind.DESCRIPTOR

        @staticmethod
        def FromString(raw: bytes) -> None:
            raise AssertionError("was parsed")

    return Unparsed


MIB = 1 << 20
GENERATE, PREFILL, SEGMENT = decode_pb2.GenerateRequest, prefill_pb2.PrefillChunkRequest, decode_pb2.Segment
HOSTILE: dict[str, tuple[Any, bytes, str]] = {
    "empty segments": (GENERATE, b"\x12\x00" * (2 * MIB), "segments"),
    "segments with empty texts": (GENERATE, b"\x12\x02\x12\x00" * MIB, "segments"),
    "stop strings": (GENERATE, (lambda s: b"\x1a\x84\x80\x80\x01" + s)(b"\x52\x00" * MIB + b"\x52\x02ab"), "stop"),
    "one number again and again": (GENERATE, b"\x20\x00" * MIB, "reuse_mode"),
    "unknown fields": (GENERATE, b"\xf8\x07\x01" * MIB, "message"),
    "unknown groups": (GENERATE, b"\xfb\x07\xfc\x07" * MIB, "message"),
    "numbers that are not packed": (GENERATE, b"\x12\x82\x80\x80\x01\x1a\xfe\xff\x7f" + b"\x08\x05" * MIB, "ids"),
    "tags": (PREFILL, b"\x42\x00" * (8 * MIB), "tags"),
    "context chunks": (PREFILL, b"\x2a\x01a" * MIB, "context_chunk_ids"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_too_many_fields_are_refused_unparsed(name: str) -> None:
    kind, raw, field = HOSTILE[name]
    with pytest.raises(InvalidRequest) as caught:
        parse(never(kind), raw)
    assert caught.value.message.startswith(f"{field}: the message has more than {FIELDS_MAX} fields")


def test_too_many_bytes_are_refused_unparsed() -> None:
    most = message_nbytes_max(2048)
    with pytest.raises(TooLarge) as caught:
        parse(never(GENERATE), b"\x0a" + bytes(most), most)
    assert str(most) in caught.value.message


def test_what_a_model_can_need_fits_its_message_limit() -> None:
    for context in (1, 128, 2048, 131072, 900_000):
        most = message_nbytes_max(context)
        tokens = GENERATE(segments=[SEGMENT(token_ids=chunks_pb2.TokenIds(ids=[2**32 - 1] * context))])
        assert len(tokens.SerializeToString()) <= most
        text = GENERATE(segments=[SEGMENT(text="x" * text_nbytes_max(context))])
        assert len(text.SerializeToString()) <= most
        named = PREFILL(context_chunk_ids=["f" * 64] * 1024, text="x" * text_nbytes_max(context))
        assert len(named.SerializeToString()) <= most
        assert parse(PREFILL, named.SerializeToString(), most) == named
    assert message_nbytes_max(1 << 30) == MESSAGE_NBYTES_MAX


def test_many_segments_within_the_bounds_are_parsed() -> None:
    message = GENERATE(segments=[SEGMENT(text="word " * 20, role="user")] * 1024)
    assert parse(GENERATE, message.SerializeToString()) == message


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 120))
def test_any_bytes_are_a_message_or_refused(raw: bytes, repeats: int) -> None:
    for kind in (GENERATE, PREFILL):
        try:
            parse(kind, raw * (repeats + 1))
        except InvalidRequest as error:
            assert len(error.message) < 300
