"""What a process of ``bench.serving``'s load generator does: asks the decode service and notes when tokens came.

Raw gRPC stubs on bytes: a message is stamped by the monotonic clock as it arrives and parsed once its stream has ended.
A document is sent in full until its chunk id is known: to its process from an answer, to all from an earlier job.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from bench.traces import Request, Tokens, Trace
from protos import chunks_pb2, decode_pb2
from serving.rpc.channel import Target

GENERATE = "/cairn.v1.DecodeService/Generate"
REQUEST_S = 300.0
START_S = 60.0  # for a process to import what it needs
CUT = "CUT"  # the status of what ran when the time was over
MODES = {
    "exact": chunks_pb2.REUSE_MODE_EXACT,
    "anchored": chunks_pb2.REUSE_MODE_ANCHORED,
    "independent": chunks_pb2.REUSE_MODE_INDEPENDENT,
}
UNSPECIFIED = chunks_pb2.CHUNK_TYPE_UNSPECIFIED
ORDERS = {"given": decode_pb2.CHUNK_ORDER_GIVEN, "canonical": decode_pb2.CHUNK_ORDER_CANONICAL}
DocumentKey = tuple[str, int, int]  # name and variant of its trace, its number
END: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # what read() gives after the last message


@dataclass(frozen=True)
class Job:
    """Sessions ``first`` to ``end`` of a trace.

    With ``arrivals`` (seconds after the beginning, one a session) a session begins when it arrives, without them as
    soon as one of ``trace.concurrency`` places is free.
    """

    address: str
    trace: Trace
    first: int
    end: int
    mode: str
    history: str  # of a conversation's earlier turns: HISTORIES
    limit_s: float  # what runs then is cut off
    order: str = "given"
    max_tokens: int | None = None  # instead of each request's own
    arrivals: tuple[float, ...] | None = None


@dataclass
class Answer:
    """One request: ``asked`` and ``times`` by the monotonic clock (s), ``counts`` tokens at each of ``times``."""

    session: int
    turn: int
    asked: float
    status: str = CUT
    detail: str = ""
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prompt_tokens: int = 0
    reused: dict[str, int] = field(default_factory=dict)  # prompt tokens by where their KV came from
    stages_ms: dict[str, float] = field(default_factory=dict)


class Caller:
    """One process' part of a job. ``known``: chunk ids of documents, which it adds to."""

    def __init__(self, job: Job, begin: float, sessions: Iterator[int], known: dict[DocumentKey, str]) -> None:
        self.answers: list[Answer] = []
        self._job, self._begin, self._sessions, self._known = job, begin, sessions, known

    async def run(self, places: int) -> None:
        """Asks; ``places`` sessions at a time unless they arrive by themselves."""
        async with Target(self._job.address).open_async() as channel:
            await asyncio.wait_for(channel.channel_ready(), START_S)
            ask = channel.unary_stream(GENERATE, None, None)
            await asyncio.sleep(max(0.0, self._begin - time.monotonic()))
            if self._job.arrivals is None:
                tasks = [asyncio.create_task(self._place(ask)) for _ in range(places)]
            else:
                tasks = [asyncio.create_task(self._arrive(ask, session)) for session in self._sessions]
            done, late = await asyncio.wait(tasks, timeout=self._job.limit_s) if tasks else (set(), set())
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            for task in done:
                task.result()

    async def _place(self, ask: Any) -> None:
        for session in self._sessions:
            await self._converse(ask, session, None)

    async def _arrive(self, ask: Any, session: int) -> None:
        assert self._job.arrivals is not None
        arrives = self._begin + self._job.arrivals[session - self._job.first]
        await asyncio.sleep(max(0.0, arrives - time.monotonic()))
        await self._converse(ask, session, arrives)

    async def _converse(self, ask: Any, session: int, arrived: float | None) -> None:
        """A session's requests. One that fails ends it: what would follow has no history."""
        history: list[decode_pb2.Segment] = []
        said: Tokens = ()
        trace = self._job.trace
        for turn, request in enumerate(trace.sessions[session]):
            message = self._message(session, turn, request, history, said)
            answer = Answer(session, turn, time.monotonic() if arrived is None or turn else arrived)
            self.answers.append(answer)
            tokens, chunk_ids, kept = await _stream(ask, message.SerializeToString(), answer)
            if answer.status != "OK":
                return
            documents = len(request.documents)
            for document, chunk_id in zip(request.documents, chunk_ids, strict=False):
                self._known[trace.name, trace.variant, document] = chunk_id
            if self._job.history == "kept":
                history.append(_turn(kept, (*request.query, *tokens)))
            elif self._job.history == "chunks":
                history = [decode_pb2.Segment(chunk_id=chunk_id) for chunk_id in chunk_ids[documents:-1]]
                history.append(_segment((*request.query, *tokens)))
            else:
                said = (*said, *request.query, *tokens)

    def _message(
        self, session: int, turn: int, request: Request, history: list[decode_pb2.Segment], said: Tokens
    ) -> decode_pb2.GenerateRequest:
        job, documents = self._job, []
        for document in request.documents:
            chunk_id = self._known.get((job.trace.name, job.trace.variant, document))
            if chunk_id is None:
                kind = chunks_pb2.CHUNK_TYPE_SYSTEM_PROMPT if document < job.trace.systems else UNSPECIFIED
                documents.append(_segment(job.trace.documents[document], kind))
            else:
                documents.append(decode_pb2.Segment(chunk_id=chunk_id))
        sampling = decode_pb2.SamplingParams(max_tokens=job.max_tokens or request.max_tokens, ignore_eos=True)
        if job.trace.sampled:
            sampling.temperature, sampling.top_p, sampling.seed = 0.8, 0.95, session * 1000 + turn
        segments = [*documents, *history, _segment((*said, *request.query))]
        return decode_pb2.GenerateRequest(
            segments=segments,
            sampling=sampling,
            reuse_mode=MODES[job.mode],
            order=ORDERS[job.order],
            keep=job.history == "kept",
        )


async def _stream(ask: Any, message: bytes, answer: Answer) -> tuple[list[int], list[str], decode_pb2.Kept]:
    """Asks and fills ``answer``; its tokens, the prompt's chunk ids ("" for the query), what is kept of the turn."""
    raw: list[tuple[float, bytes]] = []
    call = ask(message, timeout=REQUEST_S)
    try:
        while (event := await call.read()) is not END:
            raw.append((time.monotonic(), event))
        status = await call.code()
        answer.status = status.name
        if status is not grpc.StatusCode.OK:
            answer.detail = await call.details()
    except grpc.aio.AioRpcError as error:
        answer.status, answer.detail = error.code().name, error.details() or ""
    finally:
        call.cancel()
        read = _read(raw, answer)
    return read


def _read(raw: list[tuple[float, bytes]], answer: Answer) -> tuple[list[int], list[str], decode_pb2.Kept]:
    kept = decode_pb2.Kept()
    tokens: list[int] = []
    chunk_ids: list[str] = []
    for at, message in raw:
        event = decode_pb2.GenerateResponse.FromString(message)
        if event.delta.token_ids:
            answer.times.append(at)
            answer.counts.append(len(event.delta.token_ids))
            tokens.extend(event.delta.token_ids)
        if event.HasField("complete"):
            _read_complete(event.complete, answer)
            chunk_ids = [s.chunk_id for s in sorted(event.complete.reuse.segments, key=lambda s: s.given_index)]
            kept = event.complete.kept
    return tokens, chunk_ids, kept


def _read_complete(complete: decode_pb2.Complete, answer: Answer) -> None:
    answer.finish_reason = complete.finish_reason
    answer.prompt_tokens = complete.usage.prompt_tokens
    for segment in complete.reuse.segments:
        source = decode_pb2.KvSource.Name(segment.source).removeprefix("KV_SOURCE_").lower()
        for name, count in ((source, segment.cached_tokens), ("computed", segment.tokens - segment.cached_tokens)):
            if count:
                answer.reused[name] = answer.reused.get(name, 0) + count
    for stage, value in complete.timings.ListFields():
        answer.stages_ms[stage.name.removesuffix("_ns")] = value / 1e6


def _turn(kept: decode_pb2.Kept, tokens: Tokens) -> decode_pb2.Segment:
    """A turn for the requests after it: by the id it is kept under, else in full."""
    if kept.registered:
        return decode_pb2.Segment(chunk_id=kept.chunk_id)
    return _segment(tokens, chunks_pb2.CHUNK_TYPE_TURN)


def _segment(tokens: Tokens, kind: chunks_pb2.ChunkType.ValueType = UNSPECIFIED) -> decode_pb2.Segment:
    return decode_pb2.Segment(token_ids=chunks_pb2.TokenIds(ids=tokens), type=kind)
