"""The handlers of the prefill service as functions: whose chunk, who may change it, an entry for each failure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from chunk_store.tenant import SHARED_TENANT, tenant_of
from prefill_service.api.service import PrefillService
from prefill_service.jobs.job import PrefillJobs
from prefill_service.metrics import PrefillMetrics
from protos import chunks_pb2, prefill_pb2
from serving.errors import InvalidRequest, NotFound, PermissionDenied
from serving.rpc.access import Access
from tests.prefill_service.fake_worker import FakeWorker

TOKENS = "boss - admin\nann salt-a\nbob salt-b bytes=5000\n"


class Call:
    """What a handler asks of its call: who is at the other end."""

    def __init__(self, token: str = "") -> None:
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata


ANN: Any = Call("ann")
BOB: Any = Call("bob")
BOSS: Any = Call("boss")


def serve(root: Path, body: Callable[[PrefillService], Awaitable[None]], tokens: str = TOKENS) -> FakeWorker:
    worker = FakeWorker(root / "store")
    file = root / "tokens"
    file.write_text(tokens)
    jobs = PrefillJobs(worker.resolver, worker.computer, worker.store, PrefillMetrics("tiny"), jobs_max=8)
    service = PrefillService(jobs, worker.store, Access.from_file(file) if tokens else Access(), "tiny")

    async def main() -> None:
        await service.start()
        try:
            await body(service)
        finally:
            await service.stop()

    asyncio.run(asyncio.wait_for(main(), 60))
    return worker


def chunk(*ids: int, **fields: Any) -> prefill_pb2.PrefillChunkRequest:
    return prefill_pb2.PrefillChunkRequest(token_ids=chunks_pb2.TokenIds(ids=ids), **fields)


def ended(service: PrefillService, outcome: str) -> float | None:
    labels = {"model_name": "tiny", "outcome": outcome}
    return service.registry.get_sample_value("cairn_prefill_chunks_total", labels)


def test_a_chunk_is_made_and_counted(tmp_path: Path) -> None:
    async def body(service: PrefillService) -> None:
        reply = await service.PrefillChunk(chunk(5, 6), ANN)
        assert (reply.computed_tokens, reply.newly_registered) == (2, True)
        assert (await service.PrefillChunk(chunk(5, 6), ANN)).reused_tokens == 2
        with pytest.raises(InvalidRequest):
            await service.PrefillChunk(chunk(5, 999), ANN)
        assert [ended(service, o) for o in ("computed", "already_stored", "invalid_argument")] == [1, 1, 1]

    serve(tmp_path, body)


def test_an_entry_of_a_stream_fails_alone_and_later_ones_may_name_earlier_ones(tmp_path: Path) -> None:
    async def body(service: PrefillService) -> None:
        first = await service.PrefillChunk(chunk(5), ANN)

        async def requests() -> AsyncIterator[prefill_pb2.PrefillChunkRequest]:
            yield chunk(6, context_chunk_ids=[first.chunk_id])
            yield chunk(7, context_chunk_ids=["feed"])
            yield prefill_pb2.PrefillChunkRequest()
            yield chunk(8)
            yield chunk(9, context_chunk_ids=[first.chunk_id])

        entries = [entry async for entry in service.PrefillChunks(requests(), ANN)]
        assert [entry.WhichOneof("result") for entry in entries] == [
            "response",
            "error",
            "error",
            "response",
            "response",
        ]
        assert [entry.error.code for entry in entries[1:3]] == [5, 3]  # NOT_FOUND, INVALID_ARGUMENT
        assert "feed" in entries[1].error.message

    serve(tmp_path, body)


def test_a_fault_of_ours_in_a_stream_says_its_kind_and_not_its_text(tmp_path: Path) -> None:
    async def body(service: PrefillService) -> None:
        def fail() -> None:
            raise RuntimeError("somebody's prompt")

        service.jobs.computer.runner.before = fail  # type: ignore[attr-defined]

        async def requests() -> AsyncIterator[prefill_pb2.PrefillChunkRequest]:
            yield chunk(6)

        (entry,) = [entry async for entry in service.PrefillChunks(requests(), ANN)]
        assert entry.error.code == 13 and "RuntimeError" in entry.error.message and "prompt" not in entry.error.message
        assert ended(service, "internal") == 1

    serve(tmp_path, body)


def test_only_an_admin_publishes_for_everybody(tmp_path: Path) -> None:
    async def body(service: PrefillService) -> None:
        with pytest.raises(PermissionDenied, match="shared: only a token marked admin"):
            await service.PrefillChunk(chunk(5, shared=True), ANN)
        shared = await service.PrefillChunk(chunk(5, shared=True), BOSS)
        mine = await service.PrefillChunk(chunk(5), ANN)
        assert (mine.key, mine.newly_registered, mine.computed_tokens) == (shared.key, False, 0)

    worker = serve(tmp_path, body)
    assert worker.resolver.quotas is not None


def test_a_tenant_reaches_its_own_chunks_and_may_not_change_shared_ones(tmp_path: Path) -> None:
    async def body(service: PrefillService) -> None:
        mine = (await service.PrefillChunk(chunk(5, name="mine"), ANN)).chunk_id
        shared = (await service.PrefillChunk(chunk(6, shared=True), BOSS)).chunk_id
        get, named = service.GetChunk, lambda name, **f: prefill_pb2.GetChunkRequest(chunk_id=name, **f)
        assert (await get(named(mine), ANN)).name == "mine" and (await get(named(shared), BOB)).shared
        for call in (
            get(named(mine), BOB),
            service.PinChunk(prefill_pb2.PinChunkRequest(chunk_id=mine), BOB),
            service.UnpinChunk(prefill_pb2.UnpinChunkRequest(chunk_id=mine), BOB),
            service.DeleteChunk(prefill_pb2.DeleteChunkRequest(chunk_id=mine), BOB),
        ):
            with pytest.raises(NotFound, match="no chunk"):
                await call
        for call in (
            service.PinChunk(prefill_pb2.PinChunkRequest(chunk_id=shared), ANN),
            service.DeleteChunk(prefill_pb2.DeleteChunkRequest(chunk_id=shared), ANN),
        ):
            with pytest.raises(PermissionDenied, match="only a token marked admin"):
                await call
        assert (await service.PinChunk(prefill_pb2.PinChunkRequest(chunk_id=mine), ANN)).pinned
        assert not (await service.UnpinChunk(prefill_pb2.UnpinChunkRequest(chunk_id=mine), ANN)).pinned
        assert (await service.PinChunk(prefill_pb2.PinChunkRequest(chunk_id=shared), BOSS)).pinned
        deleted = await service.DeleteChunk(prefill_pb2.DeleteChunkRequest(chunk_id=mine), ANN)
        assert deleted.kv_entries == 1 and deleted.kv_bytes > 0
        await service.DeleteChunk(prefill_pb2.DeleteChunkRequest(chunk_id=shared), BOSS)
        assert service.store.get_records([shared], [SHARED_TENANT]) == [None]

    serve(tmp_path, body)


def test_listing_and_content_are_the_callers(tmp_path: Path) -> None:
    async def body(service: PrefillService) -> None:
        name = (await service.PrefillChunk(prefill_pb2.PrefillChunkRequest(text="a heap"), ANN)).chunk_id
        await service.PrefillChunk(chunk(9), BOB)
        listed = await service.ListChunks(prefill_pb2.ListChunksRequest(), ANN)
        assert [item.chunk_id for item in listed.chunks] == [name] and listed.chunks[0].kv_entries == 1
        request = prefill_pb2.GetChunkRequest(chunk_id=name, include_text=True, include_token_ids=True)
        found = await service.GetChunk(request, ANN)
        assert found.text == "a heap" and found.token_ids
        plain = await service.GetChunk(prefill_pb2.GetChunkRequest(chunk_id=name), ANN)
        assert not plain.text and not plain.token_ids
        with pytest.raises(InvalidRequest, match="page_token"):
            await service.ListChunks(prefill_pb2.ListChunksRequest(page_token="nonsense"), ANN)

    serve(tmp_path, body)


def test_the_whole_stores_numbers_are_for_who_may_see_all(tmp_path: Path) -> None:
    async def body(service: PrefillService) -> None:
        await service.PrefillChunk(chunk(5), ANN)
        await service.PrefillChunk(chunk(6), BOB)
        mine = await service.StoreStats(prefill_pb2.StoreStatsRequest(), ANN)
        assert (mine.chunks, mine.whole_store) == (1, False)
        everything = await service.StoreStats(prefill_pb2.StoreStatsRequest(), BOSS)
        assert (everything.chunks, everything.whole_store) == (2, True)
        one = await service.StoreStats(prefill_pb2.StoreStatsRequest(salt="salt-b"), BOSS)
        assert (one.chunks, one.whole_store) == (1, False)
        assert service.store.usage(tenant_of("salt-b")).records == 1

    serve(tmp_path, body)
