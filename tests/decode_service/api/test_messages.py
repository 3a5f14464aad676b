"""Messages of decode.proto as plain values, and the reports that go back."""

from __future__ import annotations

from typing import Any

import pytest

from chunk_store.key import ChunkType
from decode_service.api import messages
from decode_service.prompt.request_chunk import ChunkOutcome
from engine.kv.source import KVSource
from engine.reuse import ReuseMode
from protos import chunks_pb2, decode_pb2
from serving.errors import InvalidRequest
from serving.rpc.field_bounds import ContentBudget
from tests.decode_service.prompts import answered, composed

EOS = frozenset({1})


def segments(*parts: dict[str, Any]) -> Any:
    request = decode_pb2.GenerateRequest(segments=[decode_pb2.Segment(**part) for part in parts])
    return messages.segments_in(request.segments, ContentBudget(100))


def test_segments_are_what_they_say_and_the_last_is_a_query_unless_it_says_otherwise() -> None:
    code = chunks_pb2.CHUNK_TYPE_CODE
    found = segments({"text": "", "role": "user"}, {"token_ids": {"ids": [1, 2]}, "type": code}, {"chunk_id": "ab"})
    assert [(s.text, s.token_ids, s.chunk_id) for s in found] == [
        ("", None, None),
        (None, (1, 2), None),
        (None, None, "ab"),
    ]
    assert [s.type for s in found] == [ChunkType.CONTEXT, ChunkType.CODE, ChunkType.QUERY]
    assert [s.role for s in found] == ["user", "", ""]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([{"text": "a"}, {}], r"^segments\[1\]: give one of"),
        ([{"text": "a", "role": "r" * 1000}], r"^segments\[0\]\.role"),
        ([{"chunk_id": "a" * 1000}], r"^segments\[0\]\.chunk_id"),
        ([{"token_ids": {"ids": [1] * 60}}] * 2, r"^segments\[1\]\.token_ids: a prompt of 120 tokens"),
        ([{"text": "a"}] * (messages.SEGMENTS_MAX + 1), "^segments:"),
    ],
)
def test_segments_out_of_bounds_are_named(parts: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        segments(*parts)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stop": ["a", ""]}, r"^sampling\.stop\[1\]: is empty"),
        ({"stop": ["a" * 10_000]}, r"^sampling\.stop\[0\]"),
        ({"stop": ["a"] * 17}, r"^sampling\.stop:"),
        ({"stop_token_ids": [1] * 4097}, r"^sampling\.stop_token_ids:"),
    ],
)
def test_stop_lists_out_of_bounds_are_named_without_their_content(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        messages.check_sampling(decode_pb2.SamplingParams(**fields))
    assert "aaaaaaaa" not in caught.value.message


def sampling(max_tokens: int = 8, vocabulary: int = 100, **fields: Any) -> Any:
    return messages.sampling_in(decode_pb2.SamplingParams(**fields), max_tokens, vocabulary, EOS)


def test_unset_sampling_is_greedy_with_a_seed_of_its_own() -> None:
    unset = sampling()
    assert unset.plain_greedy and (unset.top_p, unset.repetition_penalty, unset.max_tokens) == (1.0, 1.0, 8)
    assert len({sampling().seed for _ in range(5)}) == 5 and all(0 <= sampling().seed < 2**62 for _ in range(5))
    assert messages.max_tokens_in(decode_pb2.SamplingParams()) is None
    assert messages.max_tokens_in(decode_pb2.SamplingParams(max_tokens=0)) == 0


def test_what_is_set_is_taken() -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "min_p": 0.125,
        "seed": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }
    assert sampling(logit_bias={9: -100.0, 3: 0.5}).logit_bias == ((3, 0.5), (9, -100.0))
    found = sampling(**fields, min_tokens=2, stop=["x"], stop_token_ids=[5, 5], ignore_eos=True)
    assert {name: getattr(found, name) for name in fields} == fields
    assert (found.min_tokens, found.stop, found.stop_token_ids, found.ignore_eos) == (2, ("x",), frozenset({5}), True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": float("nan")}, r"^sampling\.temperature"),
        ({"top_p": 0.0}, r"^sampling\.top_p"),
        ({"min_tokens": 9}, r"^sampling\.min_tokens"),
        ({"stop_token_ids": [100]}, r"^sampling\.stop_token_ids: 100 is outside"),
        ({"logit_bias": {100: 1.0}}, r"^sampling\.logit_bias: 100 is outside"),
        ({"logit_bias": {5: 100.5}}, r"^sampling\.logit_bias: 100\.5 for token 5"),
        ({"logit_bias": {5: float("nan")}}, r"^sampling\.logit_bias: nan for token 5"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0), "vocabulary": 2000}, r"^sampling\.logit_bias: 1025 tokens"),
        ({"top_logprobs": 21, "logprobs": True}, r"^sampling\.top_logprobs: 21 must be in 0\.\.20"),
        ({"top_logprobs": 1}, r"^sampling\.top_logprobs: 1 must be 0 without logprobs"),
        ({"vocabulary": 3, "min_tokens": 1, "stop_token_ids": [0, 2]}, r"^sampling\.min_tokens: 1 cannot be reached"),
    ],
)
def test_sampling_out_of_range_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        sampling(**fields)


def test_every_source_has_a_number() -> None:
    numbers = set()
    for source in KVSource:
        composition = composed((1, 2))
        composition.chunks[0].outcome = ChunkOutcome(source)
        numbers.add(decode_pb2.KvSource.Name(messages.reuse_out(composition).segments[0].source))
    assert numbers == {f"KV_SOURCE_{source.name}" for source in KVSource}


def test_usage_and_reuse_of_an_answer_add_up_to_its_prompt() -> None:
    sequence = answered()
    usage = messages.usage_out(sequence, 3)
    assert (usage.prompt_tokens, usage.cached_tokens, usage.computed_tokens, usage.completion_tokens) == (10, 5, 5, 3)
    report = messages.sequence_reuse_out(sequence)
    assert sum(segment.cached_tokens for segment in report.segments) == usage.cached_tokens
    assert [segment.tokens for segment in report.segments] == [2, 3, 4, 1]
    names = [decode_pb2.KvSource.Name(segment.source).removeprefix("KV_SOURCE_") for segment in report.segments]
    assert names == ["DEVICE", "STORE", "COMPUTED", "COMPUTED"]
    assert [segment.level for segment in report.segments] == [0, 1, 2, 2]
    assert [segment.offset for segment in report.segments] == [0, 0, 3, 0]
    third = report.segments[2]
    assert chunks_pb2.MissReason.Name(third.miss_reason) == "MISS_REASON_EVICTED" and third.name == "n2"
    assert chunks_pb2.Unpublished.Name(third.unpublished) == "UNPUBLISHED_STORE_FULL"


def test_the_weakest_chunk_says_how_exact_an_answer_is() -> None:
    exact = messages.reuse_out(composed((1,), (2,)))
    masked = messages.reuse_out(composed((1,), (2,), mode=ReuseMode.INDEPENDENT))
    assert [s.exactness for s in exact.segments] == [exact.exactness] * 3
    assert [s.exactness == masked.exactness for s in masked.segments] == [False, True, False]
    assert messages.reuse_out(composed((1,), mode=ReuseMode.INDEPENDENT)).exactness == exact.exactness


def test_a_request_that_ended_before_its_first_token_used_nothing() -> None:
    sequence = answered(first_token=False)
    assert messages.usage_out(sequence, 0) == decode_pb2.Usage()
    for found in messages.sequence_reuse_out(sequence).segments:
        assert (found.source, found.cached_tokens, found.miss_reason, found.unpublished) == (0, 0, 0, 0)
