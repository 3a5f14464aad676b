"""Names, tags, pins, TTLs, listings, deletion: the registry over the wire."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from protos import chunks_pb2, prefill_pb2
from serving.process.loading import Loaded
from tests.prefill_service.prefill_worker import ALREADY_STORED, COMPUTED, refusal, run, worker


def test_what_is_said_about_a_chunk_is_kept(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            made = await w.prefill(text="<|user|>stone", name="doc", tags=["x", "y"], pin=True, type=3, ttl_s=500)
            ask = prefill_pb2.GetChunkRequest(chunk_id=made.chunk_id, include_token_ids=True, include_text=True)
            chunk = await w.stub.GetChunk(ask)
            assert (chunk.name, list(chunk.tags), chunk.pinned, chunk.type) == ("doc", ["x", "y"], True, 3)
            assert chunk.text == "<|user|>stone" and len(chunk.token_ids) == chunk.tokens == made.tokens
            assert (chunk.kv_entries, chunk.kv_bytes) == (1, tiny.served.layout.nbytes(made.tokens))
            assert 490 < chunk.expires_unix_s - chunk.created_unix_s < 510

            # Using it by its id says nothing about it; registering it again without TTL takes the TTL away.
            await w.prefill(chunk_id=made.chunk_id)
            assert await w.stub.GetChunk(ask) == chunk
            await w.prefill(text="<|user|>stone", type=3, tags=["z"])
            again = await w.stub.GetChunk(ask)
            assert (again.name, set(again.tags), again.pinned) == ("doc", {"x", "y", "z"}, True)
            assert again.expires_unix_s == 0

            unpinned = await w.stub.UnpinChunk(prefill_pb2.UnpinChunkRequest(chunk_id=made.chunk_id))
            assert not unpinned.pinned
            assert (await w.stub.PinChunk(prefill_pb2.PinChunkRequest(chunk_id=made.chunk_id))).pinned

    run(body)


def test_expired_chunks_are_not_found(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            made = await w.prefill([1, 2], ttl_s=0.2)
            await asyncio.sleep(0.3)
            code, text = await w.refused(chunk_id=made.chunk_id)
            assert code is StatusCode.NOT_FOUND and "expired" in text
            assert (await w.prefill([1, 2])).newly_registered

    run(body)


def test_listings(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            for number in range(5):
                await w.prefill(
                    [number + 1], name=f"n{number}", tags=["odd"] if number % 2 else [], type=1 + number % 2
                )

            async def names(**query: Any) -> list[str]:
                reply = await w.stub.ListChunks(prefill_pb2.ListChunksRequest(**query))
                return [chunk.name for chunk in reply.chunks]

            assert await names() == [f"n{number}" for number in range(5)]
            assert await names(tag="odd") == ["n1", "n3"]
            assert await names(name="n2") == ["n2"]
            assert await names(type=chunks_pb2.CHUNK_TYPE_CONTEXT) == ["n1", "n3"]
            first = await w.stub.ListChunks(
                prefill_pb2.ListChunksRequest(page_size=3, order=prefill_pb2.ListChunksRequest.ORDER_NAME)
            )
            assert len(first.chunks) == 3 and first.next_page_token
            assert await names(page_size=3, order=3, page_token=first.next_page_token) == ["n3", "n4"]
            for query, words in (
                ({"page_size": 1001}, "page_size: 1001"),
                ({"page_token": "garbage"}, "page_token"),
                ({"order": 9}, "order: 9"),
            ):
                code, text = await refusal(w.stub.ListChunks(prefill_pb2.ListChunksRequest(**query)))
                assert code is StatusCode.INVALID_ARGUMENT and words in text

    run(body)


def test_deleting(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            made = await w.prefill([1, 2, 3])
            other = await w.prefill([4])
            await w.prefill(chunk_id=made.chunk_id, context_chunk_ids=[other.chunk_id])
            report = await w.stub.DeleteChunk(prefill_pb2.DeleteChunkRequest(chunk_id=made.chunk_id))
            assert (report.kv_entries, report.kv_bytes) == (2, 2 * tiny.served.layout.nbytes(3))
            assert len(w.computer.residents) == 1
            assert (await w.prefill([1, 2, 3])).outcome == COMPUTED
            assert (await w.prefill([1, 2, 3])).outcome == ALREADY_STORED

    run(body)


@pytest.mark.parametrize("call", ["GetChunk", "PinChunk", "UnpinChunk", "DeleteChunk"])
def test_unknown_and_missing_ids(tiny: Loaded, store: Path, call: str) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            make = getattr(prefill_pb2, f"{call}Request")
            code, text = await refusal(getattr(w.stub, call)(make(chunk_id="feed")))
            assert code is StatusCode.NOT_FOUND and "feed" in text
            code, text = await refusal(getattr(w.stub, call)(make()))
            assert code is StatusCode.INVALID_ARGUMENT and "chunk_id: missing" in text

    run(body)
