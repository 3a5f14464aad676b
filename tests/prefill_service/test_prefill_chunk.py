"""PrefillChunk and PrefillChunks over the wire: what is computed, what is reused, what is stored."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from chunk_store.key import ChunkId, ChunkKey, ChunkType, chunk_id
from chunk_store.open import open_store
from engine.reuse import ReuseMode, key_composition
from protos import chunks_pb2, prefill_pb2
from serving.process.loading import Loaded
from serving.rpc import wire
from tests.prefill_service.prefill_worker import ALREADY_STORED, COMPUTED, load_tiny, message, run, worker

A, B, C = tuple(range(10, 27)), tuple(range(40, 56)), tuple(range(70, 71))  # 17, 16 and 1 tokens; pages have 16
MODES = {
    ReuseMode.EXACT: len(A) + len(B) + len(C),
    ReuseMode.ANCHORED: len(A) + len(C),
    ReuseMode.INDEPENDENT: len(C),
}


def stored_bytes(loaded: Loaded, store: Path, key: str, ids: tuple[int, ...]) -> bytes:
    """KV as it lies in the store, verified."""
    opened = open_store(f"file://{store}")
    buffers = [bytearray(size) for size in loaded.served.layout.plane_nbytes(len(ids))]
    assert opened.load(ChunkKey(key), ids, [memoryview(buffer) for buffer in buffers]) is None
    opened.close()
    return b"".join(buffers)


def test_the_same_call_again_computes_nothing(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            first = await w.prefill(text="Where is Crystalton?", role="user", type=chunks_pb2.CHUNK_TYPE_CODE)
            ids = tiny.codec.encode("Where is Crystalton?", role="user")
            assert first.chunk_id == chunk_id(tiny.codec.identity, ChunkType.CODE, ids)
            assert (first.outcome, first.newly_registered, first.tokens) == (COMPUTED, True, len(ids))
            assert (first.computed_tokens, first.reused_tokens) == (len(ids), 0)
            assert first.model_identity == tiny.served.identity
            assert first.timings.total_ns > first.timings.prefill_ns > 0
            again = await w.prefill(text="Where is Crystalton?", role="user", type=chunks_pb2.CHUNK_TYPE_CODE)
            assert (again.chunk_id, again.key) == (first.chunk_id, first.key)
            assert (again.outcome, again.newly_registered) == (ALREADY_STORED, False)
            assert (again.computed_tokens, again.reused_tokens, again.timings.prefill_ns) == (0, len(ids), 0)

    run(body)


@pytest.mark.parametrize("mode", ReuseMode)
def test_context_and_counts_by_mode(tiny: Loaded, store: Path, mode: ReuseMode) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            number = wire.reuse_mode_out(mode)
            # Registered without KV under this context: B's own entry is computed for an empty context.
            a, b = await w.prefill(A), await w.prefill(B)
            context = [a.chunk_id, b.chunk_id]
            made = await w.prefill(C, context_chunk_ids=context, reuse_mode=number)
            assert made.computed_tokens + made.reused_tokens == MODES[mode]
            assert made.reused_tokens == (0 if mode is ReuseMode.INDEPENDENT else len(A))
            keys = key_composition(tiny.served.identity, [A, B, C], mode)
            assert made.key == keys[-1].key
            again = await w.prefill(chunk_id=made.chunk_id, context_chunk_ids=context, reuse_mode=number)
            assert (again.outcome, again.reused_tokens, again.key) == (ALREADY_STORED, MODES[mode], made.key)

    run(body)


@pytest.mark.parametrize("mode", ReuseMode)
def test_bytes_do_not_depend_on_what_was_cached(tiny: Loaded, tmp_path: Path, mode: ReuseMode) -> None:
    """Cold in one go; chunk by chunk; from another worker's store entries; after eviction from the pool."""
    number = wire.reuse_mode_out(mode)
    seen: list[bytes] = []

    async def last(store: Path, warm: bool, kv_pages: int | None = None) -> None:
        async with worker(tiny, store, kv_pages=kv_pages) as w:
            context: list[str] = []
            for ids in (A, B):
                before = context if warm else []
                made = await w.prefill(ids, context_chunk_ids=before, reuse_mode=number)
                context.append(made.chunk_id)
            made = await w.prefill(C, context_chunk_ids=context, reuse_mode=number)
            seen.append(stored_bytes(tiny, store, made.key, C))

    async def body() -> None:
        await last(tmp_path / "cold", warm=False)
        await last(tmp_path / "warm", warm=True)
        opened = open_store(f"file://{tmp_path / 'warm'}")
        opened.delete_chunks([chunk_id(tiny.codec.identity, ChunkType.CONTEXT, C)])
        opened.close()
        await last(tmp_path / "warm", warm=True)  # another process: context comes from the store
        await last(tmp_path / "tight", warm=True, kv_pages=4)  # 2 + 1 + 1 pages: nothing else fits

    run(body)
    assert len(seen) == 4 and len(set(seen)) == 1


def test_damaged_entries_are_counted_and_recomputed(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            a = await w.prefill(A)
            good = stored_bytes(tiny, store, a.key, A)
        (file,) = (store / "data" / a.key[:2]).glob(f"{a.key}.*")
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
        async with worker(tiny, store) as w:
            b = await w.prefill(B, context_chunk_ids=[a.chunk_id])
            assert (b.computed_tokens, b.reused_tokens) == (len(A) + len(B), 0)
            assert w.value("cairn_prefill_misses_total", reason="verify_failed") == 1
            assert stored_bytes(tiny, store, a.key, A) == good
            stats = await w.stub.StoreStats(prefill_pb2.StoreStatsRequest())
            assert (stats.quarantined, stats.model_name) == (1, "tiny")

    run(body)


def test_a_middle_chunk_evicted_from_the_store_is_published_again(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            a = await w.prefill(A)
            b = await w.prefill(B, context_chunk_ids=[a.chunk_id])
            c = await w.prefill(C, context_chunk_ids=[a.chunk_id, b.chunk_id])
            opened = open_store(f"file://{store}")
            opened.delete_chunks([ChunkId(b.chunk_id)])
            await w.prefill(B, reuse_mode=chunks_pb2.REUSE_MODE_INDEPENDENT)  # registered again
            again = await w.prefill(chunk_id=c.chunk_id, context_chunk_ids=[a.chunk_id, b.chunk_id])
            assert (again.computed_tokens, again.reused_tokens) == (0, len(A + B + C))  # it was in the pool
            assert w.value("cairn_prefill_tokens_total", source="device") >= len(B)
            assert opened.lookup([ChunkKey(b.key)])[0] is not None
            opened.close()

    run(body)


def test_salts_keep_tenants_apart(tiny: Loaded, store: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("ta salt-a\ntb salt-b\nfree\n")

    async def body() -> None:
        async with worker(tiny, store, token_file=tokens) as w:

            async def call(token: str, salt: str = "") -> prefill_pb2.PrefillChunkResponse:
                metadata = (("authorization", f"Bearer {token}"),)
                return await w.stub.PrefillChunk(message(A, salt=salt), metadata=metadata)

            a = await call("ta")
            b = await call("tb", salt="salt-a")  # asks for another tenant's salt, and gets its own
            assert a.key != b.key and b.outcome == COMPUTED
            assert w.value("cairn_prefill_misses_total", reason="not_stored") == 2
            assert (await call("free", salt="salt-a")).outcome == ALREADY_STORED
            assert (await call("free")).outcome == COMPUTED

    run(body)


def test_two_workers_compute_each_key_once(tiny: Loaded, model_dir: Path, store: Path) -> None:
    twin = load_tiny(model_dir)  # a model belongs to one device thread
    contents = [tuple(range(start, start + 20)) for start in range(0, 200, 20)]

    async def body() -> None:
        async with worker(tiny, store) as one, worker(twin, store) as two:
            calls = [w.prefill(ids) for ids in contents for w in (one, two, one)]
            replies = await asyncio.gather(*calls)
            assert sum(reply.computed_tokens for reply in replies) == sum(len(ids) for ids in contents)
            assert sum(reply.outcome == COMPUTED for reply in replies) == len(contents)
            totals = sum(w.value("cairn_prefill_tokens_total", source="computed") for w in (one, two))
            assert totals == sum(len(ids) for ids in contents)

    run(body)


def test_streams_keep_order_and_go_on_after_errors(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            a_id = chunk_id(tiny.codec.identity, ChunkType.CONTEXT, A)
            requests = [
                message(A),
                message(B, context_chunk_ids=[a_id]),  # names what the request before it registers
                message([10_000]),
                message(),
                message(chunk_id="nowhere"),
                message(A),
                *(message([n, n + 1]) for n in range(20)),
            ]
            replies = [reply async for reply in w.stub.PrefillChunks(iter(requests), timeout=30)]
            assert len(replies) == len(requests)
            kinds = [reply.WhichOneof("result") for reply in replies]
            assert kinds == ["response"] * 2 + ["error"] * 3 + ["response"] * 21
            assert [reply.error.code for reply in replies[2:5]] == [3, 3, 5]
            assert "10000" in replies[2].error.message
            assert replies[1].response.computed_tokens + replies[1].response.reused_tokens == len(A + B)
            assert replies[5].response.outcome == ALREADY_STORED

    run(body)


def test_a_stream_answers_before_the_next_request_comes(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            call = w.stub.PrefillChunks(timeout=30)
            for ids in (A, B, C):
                await call.write(message(ids))
                assert (await call.read()).response.computed_tokens == len(ids)
            await call.done_writing()
            assert await call.read() is cast(Any, grpc.aio).EOF

    run(body)


def test_conservation_over_a_random_workload(tiny: Loaded, store: Path) -> None:
    """Reused and computed tokens add up, per request and in the metrics, with cancelled calls in between."""
    rng = random.Random(7)
    contents = [tuple(rng.randrange(384) for _ in range(rng.choice((1, 15, 16, 17, 40)))) for _ in range(8)]

    async def body() -> None:
        async with worker(tiny, store, kv_pages=24) as w:
            ids = [(await w.prefill(content)).chunk_id for content in contents]
            answered = sum(len(content) for content in contents)
            for number in range(40):
                picks = [rng.randrange(len(contents)) for _ in range(rng.randrange(1, 5))]
                mode = rng.choice(list(ReuseMode))
                keyed = key_composition(tiny.served.identity, [contents[p] for p in picks], mode)[-1]
                expected = len(keyed.token_ids) + sum(len(contents[picks[i]]) for i in keyed.context)
                request = message(
                    chunk_id=ids[picks[-1]],
                    context_chunk_ids=[ids[p] for p in picks[:-1]],
                    reuse_mode=wire.reuse_mode_out(mode),
                )
                if number % 5 == 4:
                    call = w.stub.PrefillChunk(message([number, number, 5]))
                    await asyncio.sleep(rng.random() * 0.01)
                    call.cancel()
                made = await w.stub.PrefillChunk(request)
                assert made.computed_tokens + made.reused_tokens == expected
                answered += expected
            assert await w.server.gate.wait_idle(60)
            while w.service.jobs.queue.jobs:  # what was cancelled may run to its step's end
                await asyncio.sleep(0.01)
            counted = sum(w.value("cairn_prefill_tokens_total", source=s) for s in ("computed", "store", "device"))
            assert answered <= counted <= answered + 8 * 3  # cancelled calls may have got their three tokens
            pages = {owner: w.value("cairn_kv_pages", owner=owner) for owner in ("free", "chunk", "tail")}
            assert sum(pages.values()) == 24 and pages["tail"] == 0

    run(body)
