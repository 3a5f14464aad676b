"""Every way to be refused has its status, and a message that names the field and what to do."""

from __future__ import annotations

import asyncio
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from chunk_store.key import ChunkType, chunk_id
from chunk_store.record import ChunkRecord
from engine.reuse import ReuseMode
from protos import chunks_pb2, prefill_pb2
from serving.process.loading import Loaded
from serving.rpc.details import retry_after_s
from serving.trace.stages import StageTimer
from tests.prefill_service.prefill_worker import ALREADY_STORED, COMPUTED, refusal, run, worker
from text.codec import TextCodec

BAD_REQUESTS: list[tuple[dict[str, Any], StatusCode, str]] = [
    ({}, StatusCode.INVALID_ARGUMENT, "content: missing"),
    ({"text": ""}, StatusCode.INVALID_ARGUMENT, "text: no tokens"),
    ({"token_ids": chunks_pb2.TokenIds()}, StatusCode.INVALID_ARGUMENT, "token_ids: no tokens"),
    ({"ids": [383, 384]}, StatusCode.INVALID_ARGUMENT, "token id 384"),
    ({"ids": [4_294_967_295]}, StatusCode.INVALID_ARGUMENT, "0..383"),
    ({"ids": [1], "context_chunk_ids": ["feed"]}, StatusCode.NOT_FOUND, "context_chunk_ids: no chunk 'feed'"),
    ({"chunk_id": "feed"}, StatusCode.NOT_FOUND, "chunk_id: no chunk 'feed'"),
    ({"text": "x", "role": "wizard"}, StatusCode.INVALID_ARGUMENT, "refuses 'wizard'"),
    ({"ids": [1], "role": "user"}, StatusCode.INVALID_ARGUMENT, "role: belongs to text"),
    ({"ids": [1], "reuse_mode": 9}, StatusCode.INVALID_ARGUMENT, "reuse_mode: 9"),
    ({"ids": [1], "type": 77}, StatusCode.INVALID_ARGUMENT, "type: 77"),
    ({"ids": [1], "ttl_s": -1.0}, StatusCode.INVALID_ARGUMENT, "ttl_s"),
    ({"ids": [1], "ttl_s": float("nan")}, StatusCode.INVALID_ARGUMENT, "ttl_s"),
    ({"ids": [1], "name": "n" * 257}, StatusCode.INVALID_ARGUMENT, "name: 257"),
    ({"ids": [1], "tags": ["t"] * 65}, StatusCode.INVALID_ARGUMENT, "tags: 65"),
    ({"ids": [1], "tags": [""]}, StatusCode.INVALID_ARGUMENT, "tags: an empty tag"),
    ({"ids": [1] * 513}, StatusCode.INVALID_ARGUMENT, "chunk of 513"),
]


def test_bad_requests(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            for fields, code, words in BAD_REQUESTS:
                got, text = await w.refused(**fields)
                assert got is code and words in text, (fields, got, text)
            listed = await w.stub.ListChunks(prefill_pb2.ListChunksRequest())
            assert not listed.chunks  # a refused request registers nothing

    run(body)


def test_the_models_limit(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            half = await w.prefill([1] * 256)
            assert (await w.prefill([2] * 256, context_chunk_ids=[half.chunk_id])).outcome == COMPUTED
            for mode in (chunks_pb2.REUSE_MODE_EXACT, chunks_pb2.REUSE_MODE_INDEPENDENT):
                code, text = await w.refused([2] * 257, context_chunk_ids=[half.chunk_id], reuse_mode=mode)
                assert code is StatusCode.INVALID_ARGUMENT
                assert all(word in text for word in ("256", "257", "512"))

    run(body)


def test_a_chunk_of_another_tokenizer(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(replace(tiny, codec=TextCodec(None, "tiny")), store) as w:
            foreign = await w.prefill([5, 6])
            code, text = await w.refused(text="words")
            assert code is StatusCode.INVALID_ARGUMENT and "no tokenizer; give token_ids" in text
            other = w.service.jobs.resolver.codec.identity
        async with worker(tiny, store) as w:
            for fields in ({"chunk_id": foreign.chunk_id}, {"ids": [1], "context_chunk_ids": [foreign.chunk_id]}):
                code, text = await w.refused(**fields)
                assert code is StatusCode.FAILED_PRECONDITION
                assert other[:16] in text and tiny.codec.identity[:16] in text

    run(body)


def test_a_refused_mode(tiny: Loaded, store: Path) -> None:
    refusals = {**tiny.served.refusals, ReuseMode.ANCHORED: "dynamic NTK moves old keys"}

    async def body() -> None:
        async with worker(replace(tiny, served=replace(tiny.served, refusals=refusals)), store) as w:
            code, text = await w.refused([1], reuse_mode=chunks_pb2.REUSE_MODE_ANCHORED)
            assert code is StatusCode.FAILED_PRECONDITION and "dynamic NTK" in text
            assert (await w.prefill([1])).outcome == COMPUTED

    run(body)


def test_bounds_of_pool_registry_store_and_queue(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store, kv_pages=4, records_max=2, jobs_max=1) as w:
            a = await w.prefill([1] * 40)
            code, text = await w.refused([2] * 17, context_chunk_ids=[a.chunk_id])
            assert code is StatusCode.FAILED_PRECONDITION and "needs 5 pages" in text and "--kv-pages" in text
            await w.prefill([3])
            code, text = await w.refused([4])
            assert code is StatusCode.RESOURCE_EXHAUSTED and "registry is full" in text
            # The device thread is kept busy, so a second request finds no place.
            done = threading.Event()
            busy = asyncio.create_task(w.computer.device.run(lambda: done.wait(10), StageTimer()))
            first = asyncio.create_task(w.prefill([3], context_chunk_ids=[a.chunk_id]))
            while not w.service.jobs._running:  # it has a place, and is registered
                await asyncio.sleep(0.01)
            with pytest.MonkeyPatch.context() as patched:
                patched.delattr(w.service.jobs, "resolver")  # refused before anything is done for it
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await w.prefill([1] * 40)
            done.set()
            assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED and "at most 1" in caught.value.details()
            assert retry_after_s(caught.value.trailing_metadata()) == 1.0
            assert (await first).outcome == COMPUTED and await busy
        async with worker(tiny, store.with_name("small"), store_capacity=1000) as w:
            code, text = await w.refused([1] * 40)
            assert code is StatusCode.RESOURCE_EXHAUSTED and "capacity" in text

    run(body)


def test_a_refused_prefill_leaves_nothing(tiny: Loaded, store: Path) -> None:
    """KV that the store cannot take: content, name and pin are not there either, unless they were before."""

    async def body() -> None:
        async with worker(tiny, store, store_capacity=1000) as w:
            for ids in ([1] * 40, [2] * 40):
                code, _ = await w.refused(ids, name="big", pin=True)
                assert code is StatusCode.RESOURCE_EXHAUSTED
            assert w.service.store.stats().records == 0
            known = ChunkRecord(
                chunk_id(tiny.codec.identity, ChunkType.CONTEXT, [3] * 40),
                tiny.codec.identity,
                ChunkType.CONTEXT,
                (3,) * 40,
            )
            w.service.store.put_records([known])
            assert (await w.refused([3] * 40))[0] is StatusCode.RESOURCE_EXHAUSTED
            assert w.service.store.get_records([known.chunk_id])[0] is not None
            assert not w.service.jobs._named

    run(body)


def test_a_store_that_goes_away_and_comes_back(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            a = await w.prefill([1, 2, 3])
            shutil.rmtree(store)
            store.write_text("in the way")
            for call in (
                w.prefill([1, 2, 3]),
                w.stub.ListChunks(prefill_pb2.ListChunksRequest()),
                w.stub.StoreStats(prefill_pb2.StoreStatsRequest()),
            ):
                code, _ = await refusal(call)
                assert code is StatusCode.UNAVAILABLE
            assert w.value("cairn_store_up") == 0
            store.unlink()
            again = await w.prefill([1, 2, 3])
            assert again.key == a.key and again.newly_registered
            assert (await w.prefill([1, 2, 3])).outcome == ALREADY_STORED
            assert w.value("cairn_store_up") == 1

    run(body)


def test_faults_of_ours_are_internal_and_the_service_goes_on(
    tiny: Loaded, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            with monkeypatch.context() as broken:

                def fail(*_: Any, **options: Any) -> None:
                    raise RuntimeError("the secret prompt")

                broken.setattr(w.computer.runner, "begin", fail)
                code, text = await w.refused([1, 2])
                assert code is StatusCode.INTERNAL and "secret" not in text
                w.check_idle()
            assert (await w.prefill([1, 2])).outcome == COMPUTED
            assert w.value("cairn_prefill_chunks_total", outcome="internal") == 1

    run(body)
