"""What our own services are sent: documents and turns by their ids once these are known, in full where one is gone."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import grpc
import pytest

from cairn.client.errors import CairnError
from cairn.load.answer import OK, Answer
from cairn.load.cairn_target import CairnTarget
from cairn.load.target import Known, Sampling
from cairn.load.workload import Listed, Request
from protos import chunks_pb2, decode_pb2
from serving.rpc.details import details_metadata
from tests.cairn.cairn_fakes import FakeServices, digits

TALK = Listed("talk", ((7, 8),), ((Request((0,), (1,), 3), Request((0,), (2,), 2), Request((0,), (3,), 2)),), 1)
NAMED = digits("a")  # what the fakes register everything as


def asked(services: FakeServices, workload: Any, known: Known | None = None, **more: Any) -> list[Answer]:
    """All requests of a session."""

    async def run() -> list[Answer]:
        answers = []
        target = CairnTarget(services.address, **more)
        async with target.open(workload, {} if known is None else known, lambda *_: None) as caller:
            requests = workload.session(0)
            conversation = caller.session(0, len(requests))
            for turn, request in enumerate(requests):
                answers.append(Answer(0, turn, time.monotonic()))
                await conversation.ask(request, request.max_tokens, answers[-1])
        return answers

    return asyncio.run(run())


def sent(services: FakeServices) -> list[list[Any]]:
    """The segments of each request."""
    requests = [each for each in services.script.requests if isinstance(each, decode_pb2.GenerateRequest)]
    return [[each.chunk_id or tuple(each.token_ids.ids) or each.text for each in one.segments] for one in requests]


def requests(services: FakeServices) -> list[decode_pb2.GenerateRequest]:
    return [each for each in services.script.requests if isinstance(each, decode_pb2.GenerateRequest)]


def test_kept_turns_are_named_and_an_answer_is_noted(services: FakeServices) -> None:
    known: Known = {}
    answers = asked(services, TALK, known)
    turn = digits("turn")
    assert sent(services) == [[(7, 8), (1,)], [NAMED, turn, (2,)], [NAMED, turn, turn, (3,)]]
    assert known == {("talk", 0): NAMED}
    first = requests(services)[0]
    assert first.keep and first.sampling.ignore_eos and first.segments[0].type == chunks_pb2.CHUNK_TYPE_SYSTEM_PROMPT
    for answer in answers:
        assert (answer.status, answer.finish_reason, answer.counts) == (OK, "stop", [1, 1, 1])
        assert answer.reused == {"store": 7, "computed": 2} and answer.prompt_tokens == 9
        assert answer.stages_ms == {"first_token": 5.0, "total": 9.0} and answer.times == sorted(answer.times)


@pytest.mark.parametrize(
    ("history", "second"),
    [("chunks", [NAMED, (1, 0, 1, 2), (2,)]), ("tail", [NAMED, (1, 0, 1, 2, 2)])],
)
def test_earlier_turns_are_chunks_or_part_of_the_query(services: FakeServices, history: str, second: list[Any]) -> None:
    asked(services, TALK, history=history)
    assert sent(services)[1] == second and not requests(services)[1].keep


def test_a_session_of_one_request_keeps_nothing(services: FakeServices) -> None:
    asked(services, Listed("one", ("Long.",), ((Request((0,), "Why?", 2),),)))
    (request,) = requests(services)
    assert not request.keep and request.segments[0].type == chunks_pb2.CHUNK_TYPE_RAG_RESULT
    assert sent(services) == [["Long.", "Why?"]]


def test_where_a_chunk_is_gone_everything_is_sent_in_full(services: FakeServices) -> None:
    known: Known = {("talk", 0): "gone"}
    one = replace(TALK, sessions=(TALK.sessions[0][:1],))

    original = services.script.enter

    def enter(request: Any, context: Any) -> None:
        original(request, context)
        if isinstance(request, decode_pb2.GenerateRequest) and request.segments[0].chunk_id == "gone":
            context.abort(grpc.StatusCode.NOT_FOUND, "no such chunk")

    services.script.enter = enter
    (answer,) = asked(services, one, known)
    assert sent(services) == [["gone", (1,)], [(7, 8), (1,)]] and answer.status == OK
    assert known == {("talk", 0): NAMED}


def test_a_refusal_is_noted_and_not_asked_again(services: FakeServices) -> None:
    original, refused = services.script.enter, []
    rich = details_metadata(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=0.25)

    def enter(request: Any, context: Any) -> None:
        original(request, context)
        if isinstance(request, decode_pb2.GenerateRequest):
            refused.append(request)
            context.set_trailing_metadata(rich)
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

    services.script.enter = enter
    (answer, *_) = asked(services, TALK)
    assert (answer.status, answer.detail, answer.times) == ("RESOURCE_EXHAUSTED", "full", []) and len(refused) == 3
    assert answer.retry_after_s == 0.25


def test_options_reach_the_service(services: FakeServices) -> None:
    sampling = Sampling(0.5, 0.9, ignore_eos=False)
    more: dict[str, Any] = {
        "reuse": "independent",
        "order": "canonical",
        "history": "chunks",
        "salt": "s",
        "token": "t",
    }
    asked(services, TALK, sampling=sampling, **more)
    request = requests(services)[1]
    assert request.reuse_mode == chunks_pb2.REUSE_MODE_INDEPENDENT and request.salt == "s"
    assert request.order == decode_pb2.CHUNK_ORDER_CANONICAL and not request.sampling.ignore_eos
    assert (round(request.sampling.temperature, 2), request.sampling.seed) == (0.5, 1)
    assert services.script.metadata[-1]["authorization"] == "Bearer t"


def test_a_stream_that_breaks_and_a_service_that_is_not_there(services: FakeServices) -> None:
    services.script.fail_after_words = (grpc.StatusCode.NOT_FOUND, "gone meanwhile")
    (answer, *_) = asked(services, TALK)
    assert (answer.status, len(answer.times)) == ("NOT_FOUND", 3)
    services.stop()
    with pytest.raises(CairnError):
        asked(services, TALK, timeout_s=5.0)
