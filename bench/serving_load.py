"""How ``bench.serving``'s load generator asks the decode service: raw gRPC stubs on bytes.

A message is stamped by the monotonic clock as it arrives and parsed once its stream has ended. A document is sent in
full until its chunk id is known: to its process from an answer, to all from an earlier job. Who is asked when is
``cairn.load``'s affair, as it is that of ``cairn bench serve``, whose own target is the client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from bench.traces import Trace, ids_of
from cairn.load.answer import Answer
from cairn.load.job import Job
from cairn.load.target import Heard, Known
from cairn.load.workload import Request, TokenIds
from protos import chunks_pb2, decode_pb2
from serving.rpc.channel import Target

GENERATE = "/cairn.v1.DecodeService/Generate"
REQUEST_S = 300.0
START_S = 60.0  # for a process to import what it needs
MODES = {
    "exact": chunks_pb2.REUSE_MODE_EXACT,
    "anchored": chunks_pb2.REUSE_MODE_ANCHORED,
    "independent": chunks_pb2.REUSE_MODE_INDEPENDENT,
}
UNSPECIFIED = chunks_pb2.CHUNK_TYPE_UNSPECIFIED
ORDERS = {"given": decode_pb2.CHUNK_ORDER_GIVEN, "canonical": decode_pb2.CHUNK_ORDER_CANONICAL}
END: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # what read() gives after the last message


@dataclass(frozen=True)
class RawTarget:
    """The decode service at ``address``, as a target of ``cairn.load``; ``history``: HISTORIES."""

    address: str
    mode: str
    history: str
    order: str = "given"

    @asynccontextmanager
    async def open(self, workload: Any, known: Known, heard: Heard) -> AsyncIterator[RawCaller]:
        """A connection that is there; ``workload`` is a ``Trace``."""
        async with Target(self.address).open_async() as channel:
            await asyncio.wait_for(channel.channel_ready(), START_S)
            yield RawCaller(self, workload, known, channel.unary_stream(GENERATE, None, None))


def job_of(target: RawTarget, trace: Trace, first: int, end: int, limit_s: float, **more: Any) -> Job:
    """Sessions ``first`` to ``end`` of a trace, ``trace.concurrency`` at a time or as they arrive."""
    return Job(target, trace, first, end, trace.concurrency, limit_s=limit_s, **more)


@dataclass(frozen=True)
class RawCaller:
    """A connection."""

    target: RawTarget
    trace: Trace
    known: Known
    ask: Any

    def session(self, number: int, turns: int) -> RawConversation:
        return RawConversation(self, number)


class RawConversation:
    """One session."""

    def __init__(self, caller: RawCaller, session: int) -> None:
        self._caller, self._session, self._turn = caller, session, 0
        self._history: list[decode_pb2.Segment] = []
        self._said: TokenIds = ()

    async def ask(self, request: Request, max_tokens: int, answer: Answer) -> None:
        """See ``cairn.load.target.Conversation``."""
        caller, history = self._caller, self._caller.target.history
        message = self._message(request, max_tokens)
        tokens, chunk_ids, kept = await _stream(caller.ask, message.SerializeToString(), answer)
        if answer.status != "OK":
            return
        self._turn += 1
        query, documents = ids_of(request.query), len(request.documents)
        for document, chunk_id in zip(request.documents, chunk_ids, strict=False):
            caller.known[caller.trace.key, document] = chunk_id
        if history == "kept":
            self._history.append(_turn_of(kept, (*query, *tokens)))
        elif history == "chunks":
            self._history = [decode_pb2.Segment(chunk_id=chunk_id) for chunk_id in chunk_ids[documents:-1]]
            self._history.append(_segment((*query, *tokens)))
        else:
            self._said = (*self._said, *query, *tokens)

    def _message(self, request: Request, max_tokens: int) -> decode_pb2.GenerateRequest:
        target, trace, documents = self._caller.target, self._caller.trace, []
        for document in request.documents:
            chunk_id = self._caller.known.get((trace.key, document))
            if chunk_id is None:
                kind = chunks_pb2.CHUNK_TYPE_SYSTEM_PROMPT if document < trace.systems else UNSPECIFIED
                documents.append(_segment(trace.documents[document], kind))
            else:
                documents.append(decode_pb2.Segment(chunk_id=chunk_id))
        sampling = decode_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        if trace.sampled:
            sampling.temperature, sampling.top_p, sampling.seed = 0.8, 0.95, self._session * 1000 + self._turn
        return decode_pb2.GenerateRequest(
            segments=[*documents, *self._history, _segment((*self._said, *ids_of(request.query)))],
            sampling=sampling,
            reuse_mode=MODES[target.mode],
            order=ORDERS[target.order],
            keep=target.history == "kept",
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


def _turn_of(kept: decode_pb2.Kept, tokens: TokenIds) -> decode_pb2.Segment:
    """A turn for the requests after it: by the id it is kept under, else in full."""
    if kept.registered:
        return decode_pb2.Segment(chunk_id=kept.chunk_id)
    return _segment(tokens, chunks_pb2.CHUNK_TYPE_TURN)


def _segment(tokens: TokenIds, kind: chunks_pb2.ChunkType.ValueType = UNSPECIFIED) -> decode_pb2.Segment:
    return decode_pb2.Segment(token_ids=chunks_pb2.TokenIds(ids=tokens), type=kind)
