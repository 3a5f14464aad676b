"""Publication beside computation, through the service: bits, stores that take nothing, a full queue, many at once."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from grpc import StatusCode

from chunk_store.key import ChunkKey
from serving.process.loading import Loaded
from serving.rpc.details import retry_after_s
from tests.prefill_service.fake_worker import held_writes
from tests.prefill_service.prefill_worker import COMPUTED, DEADLINE_S, Worker, message, run, worker

A = tuple(range(10, 50))


def content(number: int) -> tuple[int, ...]:
    return tuple((7 * number + place) % 200 + 3 for place in range(8 + number % 30))


def failures(w: Worker, reason: str) -> float:
    return w.value("cairn_publication_failures_total", reason=reason)


def bits(w: Worker, key: str, tokens: tuple[int, ...]) -> bytes:
    buffers = [bytearray(size) for size in w.computer.served.layout.plane_nbytes(len(tokens))]
    reason = w.service.store.load(ChunkKey(key), tokens, [memoryview(buffer) for buffer in buffers])
    assert reason is None, reason
    return b"".join(buffers)


def test_many_at_once_through_a_small_queue_have_the_bits_of_writes_that_were_waited_for(
    tiny: Loaded, store: Path
) -> None:
    """Chunks under each other's contexts, the pool and the queue a fraction of them; half the callers go away."""

    async def body() -> None:
        async with worker(tiny, store.with_name("waited"), durable=True) as w:
            first = await w.prefill(A)
            asked = [(content(number), [first.chunk_id] if number % 2 else []) for number in range(24)]
            replies = [await w.prefill(ids, context_chunk_ids=context) for ids, context in asked]
            assert all(reply.durable for reply in replies)
            expected = [bits(w, reply.key, ids) for reply, (ids, _) in zip(replies, asked, strict=True)]
        room = 3 * tiny.served.layout.nbytes(max(len(ids) for ids, _ in asked))
        async with worker(tiny, store, publish_queue=room, publish_threads=3, kv_pages=20) as w:
            await w.prefill(A, durable=False)
            calls = [
                asyncio.ensure_future(w.prefill(ids, context_chunk_ids=context, durable=False))
                for _ in range(2)
                for ids, context in asked
            ]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            for call in calls[1 : len(asked) : 2]:
                call.cancel()
            await asyncio.wait(calls)
            answered = [call.result() for call in calls[len(asked) :]]
            assert [reply.key for reply in answered] == [reply.key for reply in replies]
            assert await asyncio.to_thread(w.computer.publisher.flush, DEADLINE_S)
            found = [bits(w, reply.key, ids) for reply, (ids, _) in zip(answered, asked, strict=True)]
            assert found == expected
            while w.service.jobs.queue.jobs:
                await asyncio.sleep(0.01)

    run(body)


def test_a_full_store_costs_durability_alone_and_who_waits_for_it_is_told(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store, store_capacity=1000) as w:
            reply = await w.prefill(A, durable=False)
            assert (reply.outcome, reply.durable) == (COMPUTED, False)
            assert await asyncio.to_thread(w.computer.publisher.flush, DEADLINE_S)
            assert failures(w, "store_full") == 1
            code, words = await w.refused(A)
            assert code is StatusCode.RESOURCE_EXHAUSTED and "capacity" in words
            again = await w.prefill(A, durable=False)
            assert again.computed_tokens == 0 and again.reused_tokens == len(A), "it is resident"

    run(body)


def test_a_store_that_goes_away_while_entries_are_queued_gets_what_comes_when_it_is_back(
    tiny: Loaded, store: Path
) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            data, away = store / "data", store / "away"
            with held_writes():
                lost = [await w.prefill(content(number), durable=False) for number in range(3)]
                if data.exists():
                    data.rename(away)
                data.write_text("not a directory")
            assert await asyncio.to_thread(w.computer.publisher.flush, DEADLINE_S)
            assert failures(w, "store_unavailable") == 3
            code, _ = await w.refused(content(0))
            assert code is StatusCode.UNAVAILABLE
            data.unlink()
            shutil.rmtree(away, ignore_errors=True)
            for number, reply in enumerate(lost):
                again = await w.prefill(content(number))
                assert (again.key, again.durable, again.computed_tokens) == (reply.key, True, 0)
                bits(w, again.key, content(number))

    run(body)


def test_a_full_queue_refuses_at_its_deadline_with_a_status_that_says_so(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store, publish_queue=1) as w:
            with held_writes():
                assert not (await w.prefill(A, durable=False)).durable
                w.service.jobs.busy_wait_s_max = 0.05
                with pytest.raises(Exception, match="wait to be written") as caught:
                    await w.stub.PrefillChunk(message(content(1), durable=False), timeout=DEADLINE_S)
                error = caught.value
                assert error.code() is StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
                assert retry_after_s(error.trailing_metadata()) == 1.0  # type: ignore[attr-defined]
                w.service.jobs.busy_wait_s_max = DEADLINE_S
                waiting = asyncio.ensure_future(w.prefill(content(1), durable=False))
                done, _ = await asyncio.wait([waiting], timeout=0.05)
                assert not done
            assert (await waiting).outcome == COMPUTED

    run(body)
