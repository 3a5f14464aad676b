"""The load generator of ``bench.serving``: processes that ask the decode service and note when tokens came.

Raw gRPC stubs on bytes: a message is stamped by the monotonic clock as it arrives and parsed once its stream has ended.
A document is sent in full the first time a process names it, by its chunk id from then on.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Self

import grpc

from bench.traces import Request, Tokens, Trace
from protos import chunks_pb2, decode_pb2
from serving.rpc.channel import Target

GENERATE = "/cairn.v1.DecodeService/Generate"
REQUEST_S = 300.0
UNPACK_S = 0.15  # for a trace to reach every process
START_S = 60.0  # for a process to import what it needs
CUT = "CUT"  # the status of what ran when the time was over
MODES = {
    "exact": chunks_pb2.REUSE_MODE_EXACT,
    "anchored": chunks_pb2.REUSE_MODE_ANCHORED,
    "independent": chunks_pb2.REUSE_MODE_INDEPENDENT,
}
END: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # what read() gives after the last message
_SPAWN = multiprocessing.get_context("spawn")


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
    history: str  # of a conversation: "chunks", each earlier turn one, or "tail", all of them before the query's tokens
    limit_s: float  # what runs then is cut off
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


@dataclass(frozen=True)
class Load:
    """What all processes saw of a job, and the share of a processor that the busiest of them took."""

    answers: list[Answer]
    busy: float


class Caller:
    """One process' part of a job."""

    def __init__(self, job: Job, begin: float, sessions: Iterator[int], known: dict[tuple[str, int], str]) -> None:
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
        for turn, request in enumerate(self._job.trace.sessions[session]):
            message = self._message(session, turn, request, history, said)
            answer = Answer(session, turn, time.monotonic() if arrived is None or turn else arrived)
            self.answers.append(answer)
            tokens, chunk_ids = await _stream(ask, message.SerializeToString(), answer)
            if answer.status != "OK":
                return
            documents = len(request.documents)
            for document, chunk_id in zip(request.documents, chunk_ids, strict=False):
                self._known[self._job.trace.name, document] = chunk_id
            if self._job.history == "chunks":
                history = [decode_pb2.Segment(chunk_id=chunk_id) for chunk_id in chunk_ids[documents:-1]]
                history.append(_segment((*request.query, *tokens)))
            else:
                said = (*said, *request.query, *tokens)

    def _message(
        self, session: int, turn: int, request: Request, history: list[decode_pb2.Segment], said: Tokens
    ) -> decode_pb2.GenerateRequest:
        job, documents = self._job, []
        for document in request.documents:
            chunk_id = self._known.get((job.trace.name, document))
            if chunk_id is None:
                documents.append(_segment(job.trace.documents[document]))
            else:
                documents.append(decode_pb2.Segment(chunk_id=chunk_id))
        sampling = decode_pb2.SamplingParams(max_tokens=job.max_tokens or request.max_tokens, ignore_eos=True)
        if job.trace.sampled:
            sampling.temperature, sampling.top_p, sampling.seed = 0.8, 0.95, session * 1000 + turn
        segments = [*documents, *history, _segment((*said, *request.query))]
        return decode_pb2.GenerateRequest(segments=segments, sampling=sampling, reuse_mode=MODES[job.mode])


class LoadGenerator:
    """The processes. For ``with``; they share a job's sessions first come, first served."""

    def __init__(self, processes: int) -> None:
        self._next = _SPAWN.Value("q", 0)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for number in range(processes):
            here, there = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_serve, args=(there, self._next, number, processes), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, job: Job) -> Load:
        """Runs a job in all processes. Raises ``RuntimeError`` if one fails, ``TimeoutError`` if one does not end."""
        self._next.value = job.first
        begin = time.monotonic() + UNPACK_S
        for pipe in self._pipes:
            pipe.send((job, begin))
        results = []
        for pipe in self._pipes:
            if not pipe.poll(job.limit_s + 2 * START_S):
                raise TimeoutError("a process of the load generator did not end with its job")
            result = pipe.recv()
            if isinstance(result, str):
                raise RuntimeError(f"the load generator failed: {result}")
            results.append(result)
        return Load([answer for answers, _ in results for answer in answers], max(busy for _, busy in results))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()  # which ends its process
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()


async def _stream(ask: Any, message: bytes, answer: Answer) -> tuple[list[int], list[str]]:
    """Asks and fills ``answer``; the answer's tokens and the prompt's chunk ids ("" for the query)."""
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


def _read(raw: list[tuple[float, bytes]], answer: Answer) -> tuple[list[int], list[str]]:
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
            chunk_ids = [segment.chunk_id for segment in event.complete.reuse.segments]
    return tokens, chunk_ids


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


def _segment(tokens: Tokens) -> decode_pb2.Segment:
    return decode_pb2.Segment(token_ids=chunks_pb2.TokenIds(ids=tokens))


def _serve(pipe: Connection, following: Any, number: int, processes: int) -> None:
    """What a process does: jobs from ``pipe`` until that is closed; ``following`` is the next session for anybody."""
    known: dict[tuple[str, int], str] = {}

    def taken(end: int) -> Iterator[int]:
        while True:
            with following.get_lock():
                session = following.value
                following.value += 1
            if session >= end:
                return
            yield session

    while True:
        try:
            job, begin = pipe.recv()
        except EOFError:
            return
        if job.arrivals is None:
            sessions = taken(job.end)
        else:
            sessions = itertools.islice(range(job.first, job.end), number, None, processes)
        places = job.trace.concurrency // processes + (number < job.trace.concurrency % processes)
        caller = Caller(job, begin, sessions, known)
        worked = time.process_time()
        try:
            asyncio.run(caller.run(places))
        except Exception as error:  # told to the one who gave the job
            pipe.send(f"{type(error).__name__}: {error}")
            return
        busy = (time.process_time() - worked) / max(1e-9, time.monotonic() - begin)
        pipe.send((caller.answers, busy))
