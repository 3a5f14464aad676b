"""The load generator beside a scripted decode service: what it sends, what it notes, what it does with failures."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest

from bench.serving_load import RawTarget, job_of
from bench.traces import Trace
from cairn.load.answer import CUT, Answer
from cairn.load.processes import Load, LoadGenerator
from cairn.load.workload import Request
from protos import chunks_pb2, decode_pb2

SERVICE = decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name
DOCUMENT = tuple(range(300, 340))
CONVERSATIONS = tuple((Request((0,), (10 + n, 20 + n), 3), Request((0,), (30 + n,), 2)) for n in range(6))
TRACE = Trace("talk", (DOCUMENT,), CONVERSATIONS, concurrency=3)


@dataclass
class Scripted:
    """Answers with tokens 1, 2, 3, ...; refuses and holds up what it was told to, by the query's first token.

    What is held up goes on once ``together`` requests run.
    """

    refused: frozenset[int] = frozenset()
    held: frozenset[int] = frozenset()
    unregistered: frozenset[int] = frozenset()
    requests: list[decode_pb2.GenerateRequest] = field(default_factory=list)
    together: int = 100
    over: threading.Event = field(default_factory=threading.Event)
    running: int = 0
    most: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def generate(self, request: decode_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        with self.lock:
            self.requests.append(request)
            self.running += 1
            self.most = max(self.most, self.running)
            if self.running >= self.together:
                self.over.set()
        try:
            yield from self._answer(request, context)
        finally:
            with self.lock:
                self.running -= 1

    def _answer(self, request: decode_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        *chunks, query = request.segments
        first = query.token_ids.ids[0]
        if first in self.refused:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        yield decode_pb2.GenerateResponse(delta=decode_pb2.Delta(text="no token yet"))
        for token in range(1, request.sampling.max_tokens + 1):
            yield decode_pb2.GenerateResponse(delta=decode_pb2.Delta(token_ids=[token]))
            if first in self.held:
                self.over.wait(60)
        complete = decode_pb2.Complete(finish_reason="length")
        for segment in chunks:
            name = segment.chunk_id or hashlib.sha256(segment.SerializeToString()).hexdigest()
            complete.reuse.segments.add(chunk_id=name, tokens=40, cached_tokens=30, source=decode_pb2.KV_SOURCE_DEVICE)
        complete.reuse.segments.add(tokens=len(query.token_ids.ids), source=decode_pb2.KV_SOURCE_COMPUTED)
        complete.timings.queue_ns = 2_000_000
        if request.keep:
            complete.kept.chunk_id, complete.kept.registered = f"turn {first}", first not in self.unregistered
        yield decode_pb2.GenerateResponse(complete=complete)


@contextmanager
def serving(service: Scripted) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(16))
    read, written = decode_pb2.GenerateRequest.FromString, decode_pb2.GenerateResponse.SerializeToString
    method = grpc.unary_stream_rpc_method_handler(service.generate, read, written)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Generate": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        service.over.set()
        server.stop(0).wait(10)


@pytest.fixture(scope="module")
def generator() -> Iterator[LoadGenerator]:
    with LoadGenerator(2) as generator:
        yield generator


def run(generator: LoadGenerator, service: Scripted, trace: Trace, **options: Any) -> Load:
    """Every trace has a name of its own: processes remember a trace's documents by it."""
    with serving(service) as address:
        asked = {"mode": "exact", "history": "chunks", "order": "given"}
        target = RawTarget(address, **{name: options.pop(name, usual) for name, usual in asked.items()})
        settings = {"first": 0, "end": len(trace.sessions), "limit_s": 60.0}
        return generator.run(job_of(target, trace, **{**settings, **options}))


def of_session(load: Load, session: int) -> list[Answer]:
    return sorted((each for each in load.answers if each.session == session), key=lambda each: each.turn)


def test_sessions_are_shared_and_their_turns_follow_each_other(generator: LoadGenerator) -> None:
    service = Scripted()
    load = run(generator, service, replace(TRACE, name="shared"))
    assert {each.session for each in load.answers} == set(range(6)) and len(load.answers) == 12
    assert service.most <= TRACE.concurrency
    for session in range(6):
        first, second = of_session(load, session)
        assert (first.status, first.counts, first.finish_reason) == ("OK", [1, 1, 1], "length")
        assert first.asked < first.times[0] and first.times == sorted(first.times)
        assert second.asked >= first.times[-1] and len(second.times) == 2
        assert first.reused == {"device": 30, "computed": 12} and first.stages_ms == {"queue": 2.0}


@pytest.mark.parametrize("history", ["chunks", "tail"])
def test_earlier_turns_are_chunks_or_part_of_the_tail(generator: LoadGenerator, history: str) -> None:
    service = Scripted()
    three = (Request((0,), (10, 20), 3), Request((0,), (30,), 2), Request((0,), (40,), 2))
    run(generator, service, Trace(f"one {history}", (DOCUMENT,), (three,), concurrency=2), history=history)
    sent = [[tuple(each.token_ids.ids) or each.chunk_id for each in request.segments] for request in service.requests]
    document = sent[1][0]
    assert sent[0] == [DOCUMENT, (10, 20)] and isinstance(document, str) and len(document) == 64
    if history == "chunks":
        assert sent[1] == [document, (10, 20, 1, 2, 3), (30,)]
        assert sent[2][0] == document and isinstance(sent[2][1], str) and sent[2][2:] == [(30, 1, 2), (40,)]
    else:
        assert sent[1:] == [[document, (10, 20, 1, 2, 3, 30)], [document, (10, 20, 1, 2, 3, 30, 1, 2, 40)]]


def test_kept_turns_are_named_and_those_that_could_not_be_are_sent(generator: LoadGenerator) -> None:
    service = Scripted(unregistered=frozenset({30}))
    four = tuple(Request((0,), (first, 20), 2) for first in (10, 30, 40, 50))
    run(generator, service, Trace("kept", (DOCUMENT,), (four,), concurrency=2), history="kept")
    assert all(request.keep for request in service.requests)
    last = service.requests[-1].segments[1:]
    assert [segment.chunk_id or tuple(segment.token_ids.ids) for segment in last] == [
        *("turn 10", (30, 20, 1, 2), "turn 40", (50, 20)),
    ]
    assert [segment.type for segment in last] == [0, chunks_pb2.CHUNK_TYPE_TURN, 0, 0]


def test_what_one_process_learnt_every_process_knows_in_the_next_job(generator: LoadGenerator) -> None:
    first, second = Scripted(), Scripted()
    trace = replace(TRACE, name="learnt", concurrency=2)
    run(generator, first, trace, end=1)
    run(generator, second, trace, first=1)
    assert first.requests[0].segments[0].token_ids.ids == list(DOCUMENT)
    assert {len(request.segments[0].chunk_id) for request in second.requests} == {64}


def test_sampling_is_asked_for_with_a_seed_a_request(generator: LoadGenerator) -> None:
    greedy, sampled = Scripted(), Scripted()
    run(generator, greedy, replace(TRACE, name="greedy"), max_tokens=1)
    run(generator, sampled, replace(TRACE, name="sampled", sampled=True), mode="independent")
    assert {each.sampling.max_tokens for each in greedy.requests} == {1}
    assert all(each.sampling.ignore_eos for each in (*greedy.requests, *sampled.requests))
    assert not any(each.sampling.HasField("temperature") for each in greedy.requests)
    assert {round(each.sampling.temperature, 2) for each in sampled.requests} == {0.8}
    assert len({each.sampling.seed for each in sampled.requests}) == 12
    assert {each.reuse_mode for each in greedy.requests} != {each.reuse_mode for each in sampled.requests}


def test_a_refusal_ends_its_session_and_no_other(generator: LoadGenerator) -> None:
    load = run(generator, Scripted(refused=frozenset({12})), replace(TRACE, name="refused"))
    (refused,) = of_session(load, 2)
    assert (refused.status, refused.detail, refused.times) == ("RESOURCE_EXHAUSTED", "full", [])
    assert sum(each.status == "OK" for each in load.answers) == 10


def test_what_runs_when_the_time_is_over_is_cut_off_and_counts_so_far(generator: LoadGenerator) -> None:
    service = Scripted(held=frozenset({10, 11, 12}))
    load = run(generator, service, replace(TRACE, name="held"), limit_s=2.5)
    assert [(each.session < 3, each.status, len(each.times)) for each in load.answers] == [(True, CUT, 1)] * 3


def test_arrivals_are_kept_however_busy_the_places_are(generator: LoadGenerator) -> None:
    service, due = Scripted(held=frozenset(range(10, 16)), together=6), (0.0, 0.01, 0.02, 0.03, 0.04, 0.3)
    load = run(generator, service, replace(TRACE, name="arrivals"), arrivals=due)
    assert service.most == 6 > TRACE.concurrency
    begin = of_session(load, 0)[0].asked
    asked = [of_session(load, session)[0].asked - begin for session in range(6)]
    assert asked == pytest.approx(due, abs=1e-6)  # when they were due, not when sent


def test_the_order_is_asked_for_and_system_prompts_are_named_as_such(generator: LoadGenerator) -> None:
    service = Scripted()
    two = replace(TRACE, name="order", documents=(DOCUMENT, DOCUMENT[:9]), sessions=((Request((0, 1), (10,), 1),),))
    run(generator, service, replace(two, systems=1), order="canonical")
    (request,) = service.requests
    assert request.order == decode_pb2.CHUNK_ORDER_CANONICAL
    assert [segment.type for segment in request.segments] == [chunks_pb2.CHUNK_TYPE_SYSTEM_PROMPT, 0, 0]


@dataclass
class Sorting(Scripted):
    """Reports its chunks in another order than they were given in."""

    def generate(self, request: decode_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        for reply in super().generate(request, context):
            segments = reply.complete.reuse.segments
            for index, segment in enumerate(segments):
                segment.given_index = index
            if len(segments) == 3:
                segments[0].given_index, segments[1].given_index = 1, 0
                segments[0].chunk_id, segments[1].chunk_id = segments[1].chunk_id, segments[0].chunk_id
            yield reply


def test_documents_are_known_by_where_they_were_given(generator: LoadGenerator) -> None:
    service = Sorting()
    request = Request((0, 1), (10,), 1)
    two = Trace("sorted", (DOCUMENT, DOCUMENT[:9]), ((request, request),), concurrency=2)
    run(generator, service, two)
    first, second = service.requests
    expected = [hashlib.sha256(segment.SerializeToString()).hexdigest() for segment in first.segments[:2]]
    assert [segment.chunk_id for segment in second.segments[:2]] == expected
