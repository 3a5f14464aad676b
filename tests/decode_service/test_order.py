"""Requests whose chunks may stand in any order, through both services: same hits, same answers, as reported."""

from __future__ import annotations

import itertools
from pathlib import Path

import grpc
import pytest

from cairn import ChunkRef, Tokens
from cairn.client.errors import InvalidRequest
from protos import decode_pb2
from tests import oracle
from tests.decode_service.models import oracle_model, tokens
from tests.decode_service.pair import Pair

QUERY = tokens(990_001, 5)


def documents(seed: int, count: int = 3) -> list[list[int]]:
    return [tokens(seed + number, 18 + number) for number in range(count)]


def test_every_order_of_the_same_documents_is_one_prompt(services: Pair, folder: Path) -> None:
    """Computed once; the answer is that of plain generation over the documents in the order that is reported."""
    system, given = tokens(77_000, 17), documents(77_001)
    model, reported = oracle_model(folder), set()
    for number, order in enumerate(itertools.permutations(range(3))):
        sent = [Tokens(system, type="system_prompt"), *(given[place] for place in order), QUERY]
        result = services.generate(sent, 5, order="canonical")
        segments = result.reuse.segments
        indices = [segment.given_index for segment in segments]
        stand = [order[index - 1] for index in indices[1:-1]]
        reported.add(tuple(stand))
        assert (indices[0], indices[-1], result.reuse.order) == (0, 4, "canonical")
        assert result.reuse.reordered == (indices != [0, 1, 2, 3, 4])
        assert [segment.tokens for segment in segments[1:-1]] == [len(given[place]) for place in stand]
        assert result.usage.computed_tokens == (result.usage.prompt_tokens if not number else len(QUERY))
        chunks = [system, *(given[place] for place in stand)]
        assert list(result.token_ids) == oracle.greedy(model, chunks, QUERY, "exact", 5)[0]
        as_reported = services.generate([Tokens(system, type="system_prompt"), *chunks[1:], QUERY], 5)
        assert as_reported.token_ids == result.token_ids and as_reported.usage.computed_tokens == len(QUERY)
        assert not as_reported.reuse.reordered and as_reported.reuse.order == "given"
    assert len(reported) == 1


def test_what_is_used_more_comes_first_and_only_answers_count(services: Pair) -> None:
    names = [services.client.prefill(ids, reuse="independent").id for ids in documents(78_000)]
    last = max(names)
    store = services.decode.store
    for _ in range(9):  # as above, but these are not asked for an answer from what is kept
        services.client.explain([services.client.prefill(documents(78_000)[names.index(last)]), QUERY])
    services.generate([services.client.prefill(documents(78_000)[names.index(last)]), QUERY], 1, cache="bypass")
    assert store.uses(names) == [0, 0, 0]  # type: ignore[arg-type]
    for reuse in ("exact", "independent"):
        services.generate([ChunkRef(last), QUERY], 1, reuse=reuse)
    plan = services.client.explain([*map(ChunkRef, names), QUERY], order="canonical")
    assert [segment.chunk_id for segment in plan.reuse.segments[:-1]] == [last, *sorted(set(names) - {last})]
    result = services.generate([*map(ChunkRef, sorted(names)), QUERY], 2, order="canonical")
    assert [s.chunk_id for s in result.reuse.segments] == [s.chunk_id for s in plan.reuse.segments]
    assert result.reuse.reordered and [s.given_index for s in result.reuse.segments] == [2, 0, 1, 3]


def test_an_unknown_order_is_refused_by_name(services: Pair) -> None:
    with pytest.raises(InvalidRequest, match="order: must be one of given, canonical"):
        services.generate([QUERY], order="any")
    segments = [decode_pb2.Segment(text="a")]
    request = decode_pb2.GenerateRequest(segments=segments, order=9)  # type: ignore[arg-type]
    with grpc.insecure_channel(services.decode_address) as channel:
        ask = channel.unary_unary(
            "/cairn.v1.DecodeService/Explain",
            request_serializer=decode_pb2.GenerateRequest.SerializeToString,
            response_deserializer=decode_pb2.ExplainResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as refused:
            ask(request, timeout=30)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "order: 9" in refused.value.details()
