"""Replies become the client's own types, field by field, from this server's numbers and a newer one's."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from cairn.client import replies
from cairn.client.chunks import Chunk
from cairn.client.errors import NotFound
from cairn.client.loads import Loads
from cairn.client.reports import Timings
from protos import chunks_pb2, decode_pb2, prefill_pb2

NAME = "c" * 64


def filled(message: Any, start: int = 1) -> Any:
    """Every plain field of a message set to something of its own."""
    for number, field in enumerate(message.DESCRIPTOR.fields, start=start):
        if field.is_repeated or field.message_type is not None:
            continue
        kinds: dict[int, Any] = {field.CPPTYPE_STRING: f"s{number}", field.CPPTYPE_BOOL: True, field.CPPTYPE_ENUM: 1}
        setattr(message, field.name, kinds.get(field.cpp_type, number))
    return message


def test_a_chunk_bears_the_requests_name_and_type() -> None:
    request = prefill_pb2.PrefillChunkRequest(name="doc", type=chunks_pb2.CHUNK_TYPE_CODE)
    reply = filled(prefill_pb2.PrefillChunkResponse())
    reply.outcome = prefill_pb2.PrefillChunkResponse.OUTCOME_ALREADY_STORED
    chunk = replies.parse_chunk(reply, request)
    assert (chunk.name, chunk.type, chunk.outcome) == ("doc", "code", "already_stored")
    assert (chunk.id, chunk.key, chunk.tokens) == (reply.chunk_id, reply.key, reply.tokens)
    assert (chunk.computed_tokens, chunk.reused_tokens) == (reply.computed_tokens, reply.reused_tokens)
    assert replies.parse_chunk(reply, prefill_pb2.PrefillChunkRequest()).type == "context"


def test_an_entry_of_a_stream_that_failed_is_an_error_value() -> None:
    request = prefill_pb2.PrefillChunkRequest(request_id="own")
    good = prefill_pb2.PrefillChunksResponse(response=prefill_pb2.PrefillChunkResponse(chunk_id=NAME))
    assert isinstance(replies.parse_chunk_or_error(good, request, "src", "stream"), Chunk)
    bad = prefill_pb2.PrefillChunksResponse(error=prefill_pb2.PrefillError(code=5, message="gone"))
    error = replies.parse_chunk_or_error(bad, request, "src", "stream")
    assert isinstance(error, NotFound) and (error.message, error.source, error.request_id) == ("gone", "src", "own")
    unnamed = replies.parse_chunk_or_error(bad, prefill_pb2.PrefillChunkRequest(), "src", "stream")
    assert isinstance(unnamed, NotFound) and unnamed.request_id == "stream"
    newer = prefill_pb2.PrefillChunksResponse(error=prefill_pb2.PrefillError(code=99, message="?"))
    assert getattr(replies.parse_chunk_or_error(newer, request, "src", ""), "code", "") == "UNKNOWN"


def test_a_stored_chunk_is_copied_field_by_field() -> None:
    message = filled(chunks_pb2.Chunk(tags=["a"], token_ids=[1, 2]))
    found = replies.parse_stored_chunk(message)
    same = {field.name for field in fields(found)} - {"id", "type", "tags", "token_ids", "expires_unix_s"}
    assert {name: getattr(found, name) for name in same} == {name: getattr(message, name) for name in same}
    assert (found.tags, found.token_ids, found.expires_unix_s) == (("a",), (1, 2), message.expires_unix_s)
    assert replies.parse_stored_chunk(chunks_pb2.Chunk()).expires_unix_s is None
    page = prefill_pb2.ListChunksResponse(chunks=[message], next_page_token="more")
    assert replies.parse_page(page) == ((found,), "more")


def test_a_result_joins_what_was_streamed() -> None:
    deltas = [
        replies.parse_delta(
            decode_pb2.Delta(
                text="a",
                token_ids=[1],
                logprobs=[-0.5],
                top_logprobs=[decode_pb2.TopLogprobs(token_ids=[4, 1], logprobs=[-0.25, -0.5])],
            )
        ),
        replies.parse_delta(decode_pb2.Delta(text="bc", token_ids=[2, 3], logprobs=[-1.0, -2.0])),
    ]
    usage = decode_pb2.Usage(prompt_tokens=9, cached_tokens=5, computed_tokens=4, completion_tokens=3)
    complete = decode_pb2.Complete(request_id="r", finish_reason="stop", usage=usage, seed=7, model_name="m")
    result = replies.parse_result(complete, deltas)
    assert (result.text, result.token_ids, result.logprobs) == ("abc", (1, 2, 3), (-0.5, -1.0, -2.0))
    assert deltas[0].top_logprobs == result.top_logprobs == (((4, -0.25), (1, -0.5)),)
    assert (result.usage.cached_tokens, result.usage.completion_tokens, result.seed) == (5, 3, 7)
    assert (result.request_id, result.finish_reason, result.model_name) == ("r", "stop", "m")


@pytest.mark.parametrize(
    ("value", "word"),
    [(0, ""), (decode_pb2.KV_SOURCE_STORE, "store"), (decode_pb2.KV_SOURCE_COMPUTED, "computed"), (99, "99")],
)
def test_a_source_is_a_word_and_a_newer_servers_its_number(value: int, word: str) -> None:
    segment: Any = decode_pb2.SegmentReport(source=value, miss_reason=value)  # type: ignore[arg-type]
    report = replies.parse_reuse(decode_pb2.ReuseReport(segments=[segment]))
    assert report.segments[0].source == word


def test_the_reuse_report_is_in_words() -> None:
    segment = decode_pb2.SegmentReport(
        chunk_id=NAME,
        name="doc",
        type=chunks_pb2.CHUNK_TYPE_RAG_RESULT,
        tokens=9,
        cached_tokens=8,
        level=1,
        offset=-3,
        exactness=chunks_pb2.EXACTNESS_EXACT_BLOCK_MASK,
        miss_reason=chunks_pb2.MISS_REASON_VERIFY_FAILED,
        unpublished=chunks_pb2.UNPUBLISHED_STORE_FULL,
    )
    message = decode_pb2.ReuseReport(segments=[segment], reuse_mode=chunks_pb2.REUSE_MODE_ANCHORED)
    report = replies.parse_reuse(message)
    (found,) = report.segments
    assert (report.reuse_mode, found.type, found.exactness) == ("anchored", "rag_result", "exact_block_mask")
    assert (found.tokens, found.cached_tokens, found.level, found.offset) == (9, 8, 1, -3)
    assert (found.miss_reason, found.unpublished) == ("verify_failed", "store_full")
    explained = replies.parse_explanation(decode_pb2.ExplainResponse(reuse=message, bytes_to_load=5, prompt_tokens=9))
    assert explained.reuse == report and (explained.bytes_to_load, explained.prompt_tokens) == (5, 9)


def test_timings_are_seconds() -> None:
    message = filled(chunks_pb2.StageTimings(), start=3)
    found = replies.parse_timings(message)
    for field in fields(Timings):
        assert getattr(found, field.name) == getattr(message, field.name.removesuffix("_s") + "_ns") / 1e9


def test_numbers_of_store_and_service_are_copied() -> None:
    stats = filled(prefill_pb2.StoreStatsResponse())
    found = replies.parse_stats(stats)
    assert all(getattr(found, field.name) == getattr(stats, field.name) for field in fields(found))
    loads = filled(decode_pb2.GetLoadsResponse())
    loads.modes.add(mode=chunks_pb2.REUSE_MODE_EXACT, supported=True, reason="", context_length_max=64)
    parsed = replies.parse_loads(loads)
    names = [field.name for field in fields(Loads) if field.name not in ("modes", "replicas")]
    assert all(getattr(parsed, name) == getattr(loads, name) for name in names)
    ((mode, supported, _, context),) = [tuple(vars(each).values()) for each in parsed.modes]
    assert (mode, supported, context) == ("exact", True, 64)
    assert replies.parse_deleted(prefill_pb2.DeleteChunkResponse(kv_entries=2, kv_bytes=3)).kv_bytes == 3
    assert replies.parse_aborted(decode_pb2.AbortResponse(found=True))
