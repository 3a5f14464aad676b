"""The two services as scripted fakes on a loopback port: the protocol without a model."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from protos import chunks_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc


def digits(text: str) -> str:
    """A chunk id of the right shape for a content."""
    return text.encode().hex().ljust(64, "0")[:64]


@dataclass
class Script:
    """What the fakes do next and what they saw."""

    words: list[str] = field(default_factory=lambda: ["Cairn ", "is ", "stone."])
    fail: list[tuple[grpc.StatusCode, str]] = field(default_factory=list)  # one for each coming call
    fail_after_words: tuple[grpc.StatusCode, str] | None = None
    endless: bool = False
    omit_complete: bool = False
    delay_s: float = 0.0
    model: str = ""
    alone: bool = True  # else questions about its load come by themselves, and are not among the requests
    away: tuple[grpc.StatusCode, str] | None = None  # what these are answered with
    loads_hang: bool = False
    durable: bool = True
    chunks: int = 5
    pages_asked: list[int] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)

    def enter(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.fail:
            context.abort(*self.fail.pop(0))
        if self.delay_s:
            self.stopped.wait(self.delay_s)


def stored_chunk(number: int) -> chunks_pb2.Chunk:
    return chunks_pb2.Chunk(
        chunk_id=digits(f"chunk {number:03d}"),
        type=chunks_pb2.CHUNK_TYPE_CONTEXT,
        name=f"doc-{number}",
        tags=["demo"],
        tokens=10 + number,
        created_unix_s=1000.0,
        last_used_unix_s=2000.0,
        kv_entries=1,
        kv_bytes=2048,
    )


class FakePrefill(prefill_pb2_grpc.PrefillServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def PrefillChunk(self, request, context):
        self.script.enter(request, context)
        return self.respond(request)

    def respond(self, request):
        text = request.text or request.chunk_id or ",".join(map(str, request.token_ids.ids))
        return prefill_pb2.PrefillChunkResponse(
            chunk_id=digits(text),
            key="k" + digits(text)[1:],
            outcome=prefill_pb2.PrefillChunkResponse.OUTCOME_COMPUTED,
            tokens=7,
            computed_tokens=7,
            timings=chunks_pb2.StageTimings(prefill_ns=2_500_000, total_ns=3_000_000),
            model_identity="m",
            newly_registered=True,
            durable=self.script.durable,
        )

    def PrefillComposition(self, request, context):
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "clients do not call it")

    def PrefillChunks(self, requests, context):
        for request in requests:
            self.script.enter(request, context)
            if request.text == "bad":
                error = prefill_pb2.PrefillError(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message="text: bad")
                yield prefill_pb2.PrefillChunksResponse(error=error)
            else:
                yield prefill_pb2.PrefillChunksResponse(response=self.respond(request))

    def OpenHandOver(self, request, context):
        self.script.enter(request, context)
        return prefill_pb2.OpenHandOverResponse()

    def GetChunk(self, request, context):
        self.script.enter(request, context)
        for number in range(self.script.chunks):
            chunk = stored_chunk(number)
            if chunk.chunk_id == request.chunk_id:
                if request.include_token_ids:
                    chunk.token_ids.extend([1, 2, 3])
                if request.include_text:
                    chunk.text = "the text"
                return chunk
        return context.abort(grpc.StatusCode.NOT_FOUND, f"chunk_id: {request.chunk_id} is not registered")

    def ListChunks(self, request, context):
        self.script.enter(request, context)
        start = int(request.page_token or 0)
        self.script.pages_asked.append(start)
        found = [stored_chunk(number) for number in range(self.script.chunks)]
        found = [chunk for chunk in found if not request.name or chunk.name == request.name]
        page = found[start : start + request.page_size]
        end = start + len(page)
        return prefill_pb2.ListChunksResponse(chunks=page, next_page_token=str(end) if end < len(found) else "")

    def PinChunk(self, request, context):
        self.script.enter(request, context)
        return chunks_pb2.Chunk(chunk_id=request.chunk_id, pinned=True)

    def UnpinChunk(self, request, context):
        self.script.enter(request, context)
        return chunks_pb2.Chunk(chunk_id=request.chunk_id, pinned=False)

    def DeleteChunk(self, request, context):
        self.script.enter(request, context)
        return prefill_pb2.DeleteChunkResponse(kv_entries=2, kv_bytes=4096)

    def StoreStats(self, request, context):
        self.script.enter(request, context)
        return prefill_pb2.StoreStatsResponse(
            backend="file", chunks=5, kv_bytes=99, capacity_bytes=1000, model_name="f"
        )


class FakeDecode(decode_pb2_grpc.DecodeServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def Generate(self, request, context):
        script = self.script
        script.enter(request, context)
        try:
            for index in range(max(1, request.sampling.n)):
                yield from self.words(request, context, index)
                if script.fail_after_words:
                    context.abort(*script.fail_after_words)
                if not script.omit_complete:
                    yield decode_pb2.GenerateResponse(complete=self.complete(request, index))
        finally:
            if not context.is_active():
                script.cancelled.set()

    def words(self, request, context, index):
        count = 0
        while True:
            for word in self.script.words:
                if not context.is_active():
                    return
                logprobs = [-0.5] if request.sampling.logprobs else []
                delta = decode_pb2.Delta(text=word, token_ids=[count], logprobs=logprobs, index=index)
                yield decode_pb2.GenerateResponse(delta=delta)
                count += 1
                if self.script.endless:
                    time.sleep(0.01)
            if not self.script.endless:
                return

    def complete(self, request, index):
        return decode_pb2.Complete(
            request_id=request.request_id or "picked",
            finish_reason="stop",
            usage=decode_pb2.Usage(prompt_tokens=9, cached_tokens=7, computed_tokens=2, completion_tokens=3),
            reuse=self.report(request),
            timings=chunks_pb2.StageTimings(first_token_ns=5_000_000, total_ns=9_000_000),
            seed=42,
            model_name="fake",
            kept=self.kept(request) if request.keep else None,
            index=index,
            chat=self.chat(request),
        )

    def chat(self, request):
        again = "messages[1]: unknown"
        return decode_pb2.ChatReport(pieces=2, rendered_again=again) if request.HasField("chat") else None

    def kept(self, request):
        if not request.request_id.startswith("full"):
            kv = decode_pb2.KEPT_KV_COMPUTING
            return decode_pb2.Kept(chunk_id=digits("turn"), registered=True, kv=kv, query_token_ids=[4, 5])
        return decode_pb2.Kept(
            chunk_id=digits("turn"), kv=decode_pb2.KEPT_KV_NONE, reason=decode_pb2.NOT_KEPT_STORE_FULL
        )

    def report(self, request):
        first = decode_pb2.SegmentReport(
            chunk_id=digits("a"),
            name="doc",
            type=chunks_pb2.CHUNK_TYPE_CONTEXT,
            tokens=7,
            cached_tokens=7,
            source=decode_pb2.KV_SOURCE_STORE,
            level=0,
            offset=-4,
            exactness=chunks_pb2.EXACTNESS_EXACT_BLOCK_MASK,
        )
        query = decode_pb2.SegmentReport(
            type=chunks_pb2.CHUNK_TYPE_QUERY,
            tokens=2,
            source=decode_pb2.KV_SOURCE_COMPUTED,
            level=1,
            exactness=chunks_pb2.EXACTNESS_EXACT_CONTEXT,
            miss_reason=chunks_pb2.MISS_REASON_NOT_STORED,
        )
        return decode_pb2.ReuseReport(
            reuse_mode=request.reuse_mode, exactness=chunks_pb2.EXACTNESS_EXACT_BLOCK_MASK, segments=[first, query]
        )

    def Explain(self, request, context):
        self.script.enter(request, context)
        return decode_pb2.ExplainResponse(
            prompt_tokens=9,
            cached_tokens=7,
            computed_tokens=2,
            chat=self.chat(request),
            reuse=self.report(request),
            bytes_to_load=2048,
            bytes_read_per_step=4096,
        )

    def Abort(self, request, context):
        self.script.enter(request, context)
        return decode_pb2.AbortResponse(found=request.request_id == "running")

    def GetLoads(self, request, context):
        if self.script.loads_hang:
            self.script.stopped.wait(60.0)
        if self.script.alone:
            self.script.enter(request, context)
        elif self.script.away:
            context.abort(*self.script.away)
        modes = [decode_pb2.ModeSupport(mode=chunks_pb2.REUSE_MODE_ANCHORED, supported=False, reason="dynamic NTK")]
        return decode_pb2.GetLoadsResponse(
            running=1,
            pages_total=100,
            page_size=16,
            model_name="fake",
            model_identity=self.script.model,
            modes=modes,
        )


class FakeServices:
    """Both fakes behind one port, with a health service."""

    def __init__(self, port: int = 0, credentials: grpc.ServerCredentials | None = None) -> None:
        self.script = Script()
        self.health = health.HealthServicer()
        self._pool = ThreadPoolExecutor(max_workers=8)
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(FakePrefill(self.script), self._server)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(FakeDecode(self.script), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.health.set("", health_pb2.HealthCheckResponse.SERVING)
        place = f"127.0.0.1:{port}"
        if credentials is None:
            self.port = self._server.add_insecure_port(place)
        else:
            self.port = self._server.add_secure_port(place, credentials)
        self.address = f"127.0.0.1:{self.port}"
        self._server.start()

    def stop(self) -> None:
        self.script.stopped.set()
        self._server.stop(0).wait()
        self._pool.shutdown()
