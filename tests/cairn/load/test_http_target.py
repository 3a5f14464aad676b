"""What is sent to an OpenAI-compatible server, what is noted of its answers, and what of its failures."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from cairn.client.errors import CairnError
from cairn.load.answer import CUT, OK, Answer
from cairn.load.http_target import HttpTarget
from cairn.load.target import Sampling
from cairn.load.workload import WORKLOADS, Lengths, Listed, Request, joined
from tests.cairn.load.openai_server import OpenAI, serving

RAG = replace(WORKLOADS["rag"], lengths=Lengths(3, 4, 2, 3), count=3, picked=2)
TALK = Listed("talk", ("Be kind.", "Long."), ((Request((0, 1), "First?", 2), Request((0, 1), "Second?", 2)),), 1)


def asked(target: HttpTarget, workload: Any, session: int = 0) -> list[Answer]:
    """All requests of a session."""

    async def run() -> list[Answer]:
        answers = []
        async with target.open(workload, {}, lambda *_: None) as caller:
            requests = workload.session(session)
            conversation = caller.session(session, len(requests))
            for turn, request in enumerate(requests):
                answers.append(Answer(session, turn, time.monotonic()))
                await conversation.ask(request, request.max_tokens, answers[-1])
        return answers

    return asyncio.run(run())


def test_documents_are_parts_of_a_chats_question_and_turns_follow() -> None:
    service = OpenAI()
    with serving(service) as url:
        first, second = asked(HttpTarget(url, token="secret", more={"cairn": {"keep": True}}), TALK)
    (path, one, headers), (_, two, _) = service.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    parts = [{"type": "text", "text": "Long."}, {"type": "text", "text": "First?"}]
    assert one["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": parts}]
    assert two["messages"][2:] == [{"role": "assistant", "content": " w0 w1"}, {"role": "user", "content": "Second?"}]
    assert two["messages"][:2] == one["messages"]
    assert (one["model"], one["stream"], one["stream_options"]) == ("words", True, {"include_usage": True})
    assert (one["ignore_eos"], one["temperature"], one["cairn"]) == (True, 0.0, {"keep": True}) and "seed" not in one
    for answer in (first, second):
        assert (answer.status, answer.finish_reason, answer.generated) == (OK, "length", 2)
        assert len(answer.times) == 2 and answer.asked < answer.times[0] <= answer.times[1]
        assert answer.reused == {"cached": 7, "computed": 13} and answer.prompt_tokens == 20


@pytest.mark.parametrize("vocabulary", [None, 500])
def test_completions_are_asked_with_one_prompt(vocabulary: int | None) -> None:
    service, workload = OpenAI(cached=None), replace(RAG, vocabulary=vocabulary)
    sampling = Sampling(0.7, 0.9, ignore_eos=False)
    with serving(service) as url:
        (answer,) = asked(HttpTarget(url, "completions", "mine", sampling=sampling), workload, 5)
    (path, body, headers), (request,) = service.requests[0], workload.session(5)
    documents = [workload.documents[place] for place in request.documents]
    joint = joined([*documents, request.query])
    whole = joint if vocabulary is None else list(joint)
    assert (path, body["prompt"], body["model"]) == ("/v1/completions", whole, "mine")
    assert (body["temperature"], body["top_p"], body["seed"]) == (0.7, 0.9, 5000) and "ignore_eos" not in body
    assert "Authorization" not in headers and answer.status == OK and answer.reused == {}


def test_tokens_that_come_together_are_counted_by_the_server() -> None:
    service = OpenAI(words_an_event=3)
    with serving(service) as url:
        (answer,) = asked(HttpTarget(url), replace(RAG, lengths=Lengths(0, 4, 2, 7)))
    assert len(answer.times) == 3 and answer.generated == 7


@pytest.mark.parametrize(
    ("service", "status", "detail"),
    [
        (OpenAI(refusals=[(429, {"Retry-After": "3"}, {"error": {"message": "full"}})]), "HTTP 429", "full"),
        (OpenAI(refusals=[(500, {}, b"<html>oh</html>")]), "HTTP 500", "<html>oh</html>"),
        (OpenAI(refusals=[(500, {}, b'{"error": "flat"}')]), "HTTP 500", '{"error": "flat"}'),
        (OpenAI(done=False), "PROTOCOL", "before [DONE]"),
        (OpenAI(raw=b"data: {not json\n\n"), "PROTOCOL", "JSONDecodeError"),
        (OpenAI(raw=b'data: [1, 2]\n\n'), "PROTOCOL", "AttributeError"),
        (OpenAI(raw=b'data: {"error": {"message": "died", "code": 500}}\n\ndata: [DONE]\n\n'), "ERROR 500", "died"),
        (OpenAI(raw=b'data: {"error": "died"}\n\n'), "ERROR", "died"),
    ],
)  # fmt: skip
def test_a_failure_is_named(service: OpenAI, status: str, detail: str) -> None:
    with serving(service) as url:
        (answer,) = asked(HttpTarget(url), RAG)
    assert answer.status == status and detail in answer.detail
    assert answer.retry_after_s == (3.0 if status == "HTTP 429" else None)


def test_nobody_there_and_nobody_answering() -> None:
    with serving(OpenAI()) as url:
        pass
    (answer,) = asked(HttpTarget(url, model="m"), RAG)
    assert answer.status == "ConnectError"
    with pytest.raises(CairnError, match="cannot be reached"):
        asked(HttpTarget(url), RAG)
    with serving(OpenAI(held=threading.Event())) as url:
        (answer,) = asked(HttpTarget(url, timeout_s=0.5), RAG)
    assert (answer.status, len(answer.times)) == ("TIMEOUT", 1)


@pytest.mark.parametrize("models", [None, {"data": []}, [], {"data": [{}]}])
def test_a_server_without_models_needs_a_name(models: Any) -> None:
    with serving(OpenAI(models=models)) as url, pytest.raises(CairnError, match="name"):
        asked(HttpTarget(url), RAG)


def test_an_answer_that_is_left_says_so() -> None:
    async def leave(url: str) -> Answer:
        answer = Answer(0, 0, time.monotonic())
        async with HttpTarget(url).open(RAG, {}, lambda *_: None) as caller:
            asking = asyncio.create_task(caller.session(0, 1).ask(RAG.session(0)[0], 5, answer))
            deadline = time.monotonic() + 60
            while not answer.times and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        return answer

    with serving(OpenAI(held=threading.Event())) as url:
        answer = asyncio.run(leave(url))
    assert answer.status == CUT and len(answer.times) == 1
