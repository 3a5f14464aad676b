"""Other workers, cancelled callers, long computations: what a job waits for and what ends the waiting."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from chunk_store.entry import MissReason
from chunk_store.errors import ClaimLost
from chunk_store.key import ChunkKey
from chunk_store.open import open_store
from chunk_store.store import Busy, Stored
from engine.reuse import ReuseMode, key_composition
from engine.run.protocol import StepRows
from prefill_service.api.ordered import in_order
from serving.process.loading import Loaded
from serving.store.heartbeat import heartbeat
from tests.prefill_service.prefill_worker import ALREADY_STORED, COMPUTED, message, run, worker

A, B = (1, 2, 3), (4, 5, 6, 7)


def keys_of(loaded: Loaded, *chunks: tuple[int, ...]) -> list[ChunkKey]:
    return [chunk.key for chunk in key_composition(loaded.served.identity, list(chunks), ReuseMode.EXACT)]


def test_a_busy_key_is_waited_for(tiny: Loaded, store: Path) -> None:
    """Another writer gives up after a while: this worker takes over."""

    async def body() -> None:
        async with worker(tiny, store) as w:
            other = open_store(f"file://{store}")
            claim = other.begin(keys_of(tiny, A)[0])
            assert not isinstance(claim, Stored | Busy)
            waiting = asyncio.create_task(w.prefill(A))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            assert (await w.prefill(B)).outcome == COMPUTED  # the device thread is free meanwhile
            claim.abort()
            assert (await waiting).computed_tokens == len(A)
            other.close()

    run(body)


def test_waiting_ends_at_its_deadline(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            w.service.jobs.busy_wait_s_max = 0.2
            other = open_store(f"file://{store}")
            with other.begin(keys_of(tiny, A)[0]):  # type: ignore[union-attr]
                code, text = await w.refused(A)
            assert code is StatusCode.UNAVAILABLE and "another worker" in text
            other.close()

    run(body)


def test_a_claim_lost_while_computing_is_made_good(tiny: Loaded, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            real, calls = w.service.store.begin, []

            def begin(key: ChunkKey, *, ttl_s: float) -> Any:
                answer = real(key, ttl_s=ttl_s)
                calls.append(key)
                if len(calls) == 1:
                    monkeypatch.setattr(answer, "commit", lose)
                return answer

            def lose() -> None:
                raise ClaimLost("swept")

            monkeypatch.setattr(w.service.store, "begin", begin)
            made = await w.prefill(A)
            assert (made.outcome, made.computed_tokens, made.reused_tokens, len(calls)) == (COMPUTED, len(A), 0, 2)

    run(body)


def test_what_was_stored_since_the_lookup_is_used(tiny: Loaded, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            a = await w.prefill(A)
            b = await w.prefill(B, context_chunk_ids=[a.chunk_id])
        async with worker(tiny, store) as w:
            monkeypatch.setattr(w.service.store, "lookup", lambda keys: [None] * len(keys))
            made = await w.prefill([9], context_chunk_ids=[a.chunk_id, b.chunk_id])
            assert (made.computed_tokens, made.reused_tokens) == (1, len(A + B))
            again = await w.prefill([9], context_chunk_ids=[a.chunk_id, b.chunk_id])
            assert (again.outcome, again.computed_tokens, again.reused_tokens) == (ALREADY_STORED, 0, 1 + len(A + B))

    run(body)


def test_an_unreadable_context_is_computed_for_oneself(
    tiny: Loaded, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry may be fine (an I/O error): it stays, and the job goes on without it."""

    async def body() -> None:
        async with worker(tiny, store) as w:
            a = await w.prefill(A)
            b = await w.prefill(B, context_chunk_ids=[a.chunk_id])
        async with worker(tiny, store) as w:
            monkeypatch.setattr(w.service.store, "land", lambda *_: MissReason.LOAD_FAILED)
            made = await w.prefill([9], context_chunk_ids=[a.chunk_id, b.chunk_id])
            assert (made.computed_tokens, made.reused_tokens) == (1 + len(A + B), 0)
            assert w.value("cairn_prefill_misses_total", reason="load_failed") == 2

    run(body)


def test_a_cancelled_call_stops_between_two_chunks(tiny: Loaded, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            runner = w.computer.runner
            real, computed, go_on, begun = runner.begin, [], threading.Event(), threading.Event()

            def slow(batch: Sequence[StepRows]) -> Any:
                begun.set()
                assert go_on.wait(10)
                computed.append(tuple(batch[0].sources))
                return real(batch)

            a, b = await w.prefill(A), await w.prefill(B)
            monkeypatch.setattr(runner, "begin", slow)
            context = [b.chunk_id, a.chunk_id, b.chunk_id]  # b is stored; a and b under b are not
            call = w.stub.PrefillChunk(message([9], context_chunk_ids=context))
            assert await asyncio.to_thread(begun.wait, 60)
            call.cancel()
            assert await w.server.gate.wait_idle(60)
            go_on.set()
            again = await w.prefill([9], context_chunk_ids=[b.chunk_id])
            assert again.computed_tokens == 1
            assert computed == [A, (9,)]

    run(body)


def test_a_cancelled_job_keeps_its_place_until_its_step_ends(
    tiny: Loaded, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool is in use until the device thread lets go of it; what it computes meanwhile is counted."""

    async def body() -> None:
        async with worker(tiny, store) as w:
            jobs, runner = w.service.jobs, w.computer.runner
            real, go_on, begun = runner.begin, threading.Event(), threading.Event()

            def slow(*arguments: Any, **options: Any) -> Any:
                begun.set()
                assert go_on.wait(60)
                return real(*arguments, **options)

            monkeypatch.setattr(runner, "begin", slow)
            call = w.stub.PrefillChunk(message(A))
            assert await asyncio.to_thread(begun.wait, 60)
            waiting = w.stub.PrefillChunk(message(B))
            while jobs.queue.jobs < 2:
                await asyncio.sleep(0.01)
            waiting.cancel()
            call.cancel()
            assert await w.server.gate.wait_idle(60)  # callers are told at once
            while jobs.queue.jobs > 1:  # what has not begun never does
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert (jobs.queue.jobs, w.computer.residents.held) == (1, 1)
            assert w.value("cairn_prefill_tokens_total", source="computed") == 0
            go_on.set()
            while jobs.queue.jobs:
                await asyncio.sleep(0.01)
            w.check_idle()
            assert w.value("cairn_prefill_tokens_total", source="computed") == len(A)

    run(body)


def test_callers_are_cancelled_at_their_deadline(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            other = open_store(f"file://{store}")
            with other.begin(keys_of(tiny, A)[0]):  # type: ignore[union-attr]
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await w.stub.PrefillChunk(message(A), timeout=0.3)
                assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
                assert await w.server.gate.wait_idle(60)
            assert (await w.prefill(A)).outcome == COMPUTED
            assert (await w.prefill(A)).outcome == ALREADY_STORED
            other.close()

    run(body)


def test_heartbeats_keep_a_claim_alive(tmp_path: Path) -> None:
    one, two = open_store(f"file://{tmp_path / 's'}"), open_store(f"file://{tmp_path / 's'}")
    key = ChunkKey("a" * 64)
    with one.begin(key, ttl_s=2.0) as claim, heartbeat(claim.renew, every_s=0.05):  # type: ignore[union-attr]
        time.sleep(2.5)
        assert isinstance(two.begin(key), Busy)
    assert not isinstance(two.begin(key), Busy)
    one.close()
    two.close()


def test_in_order_bounds_and_cancels() -> None:
    async def body() -> None:
        running: set[int] = set()
        most = 0
        read: list[int] = []

        async def items() -> AsyncIterator[int]:
            for number in range(20):
                read.append(number)
                yield number

        async def work(number: int) -> int:
            nonlocal most
            running.add(number)
            most = max(most, len(running))
            try:
                await asyncio.sleep(0.02 * (number % 3))
                return number
            finally:
                running.discard(number)

        async def begin(number: int) -> asyncio.Task[int]:
            return asyncio.create_task(work(number))

        assert [result async for result in in_order(items(), begin, 3)] == list(range(20))
        assert 2 <= most <= 3
        read.clear()
        results = in_order(items(), begin, 3)
        assert await anext(results) == 0
        await results.aclose()
        await asyncio.sleep(0)
        assert not running and len(read) <= 5

    run(body)
