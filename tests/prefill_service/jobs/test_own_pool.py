"""Waiting between attempts: for other workers, for room, for what left the pool; and what is given back of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from chunk_store.store import Busy, Stored
from chunk_store.tenant import tenant_of
from engine.kv.source import KVSource
from engine.reuse import ReuseMode
from prefill_service.jobs.progress import JobProgress
from prefill_service.jobs.resolver import PrefillJob
from serving.errors import Overloaded, Unavailable
from serving.trace.stages import StageTimer
from tests.fakes import LAYOUT
from tests.prefill_service.fake_worker import FakeWorker, held_writes

TENANT = tenant_of("")
ROOM = LAYOUT.nbytes(2)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[FakeWorker]:
    made = FakeWorker(tmp_path, room=ROOM)
    yield made
    made.idle()
    made.close()


async def compute(bench: FakeWorker, job: PrefillJob, within_s: float = 20.0) -> JobProgress:
    progress = JobProgress(StageTimer())
    await bench.computer.compute(job, progress, time.monotonic() + within_s)
    return progress


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 60))


def test_room_is_waited_for_and_what_waits_is_computed_then(bench: FakeWorker) -> None:
    async def body() -> None:
        with held_writes():
            await compute(bench, bench.job(1, 1))
            with pytest.raises(Overloaded, match="wait to be written"):
                await compute(bench, bench.job(2, 2), within_s=0.02)
            waiting = asyncio.create_task(compute(bench, bench.job(3, 3)))
            done, _ = await asyncio.wait([waiting], timeout=0.05)
            assert not done and len(bench.runner.computed) == 1
        progress = await waiting
        assert progress.timer.spent_ns()["publish"] > 0

    run(body)


async def waiting_for_room(bench: FakeWorker) -> asyncio.Task[object]:
    """A job that has asked for room behind what is held up."""
    waiting = asyncio.create_task(compute(bench, bench.job(2, 2)))
    while not bench.publisher.room._asked:
        await asyncio.sleep(0.002)
    return waiting


def test_who_is_cancelled_while_it_waits_for_room_leaves_it_to_others(bench: FakeWorker) -> None:
    async def body() -> None:
        with held_writes():
            await compute(bench, bench.job(1, 1))
            waiting = await waiting_for_room(bench)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await compute(bench, bench.job(3, 3))

    run(body)


def test_a_composition_larger_than_the_queue_is_computed_chunk_by_chunk(bench: FakeWorker) -> None:
    async def body() -> None:
        ids: list[str] = []
        for name in (1, 2, 3):
            ids.append(bench.job(name, name).chunk_id)
        await compute(bench, bench.job(4, context=tuple(ids)))
        assert [ids for ids, _ in bench.runner.computed] == [(1, 1), (2, 2), (3, 3), (4,)]

    run(body)


def test_another_worker_is_waited_for_until_the_deadline(bench: FakeWorker, tmp_path: Path) -> None:
    async def body() -> None:
        job = bench.job(1, 1)
        claim = bench.store.begin(job.key)
        assert not isinstance(claim, Busy | Stored)
        with claim, pytest.raises(Unavailable, match="another worker"):
            await compute(bench, job, within_s=0.0)
        await compute(bench, job)

    run(body)


def test_the_deadline_is_of_waiting_for_nothing_not_of_all_a_composition(
    bench: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that take longer together than anybody waits for another worker; then one that another worker computes."""
    late = [0.0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + late[0]

    def takes_long() -> None:
        late[0] += 30.0

    async def body() -> None:
        job = bench.composition((1, 1), (2, 2), (3, 3), mode=ReuseMode.INDEPENDENT)
        claim = bench.store.begin(job.chunks[0].key)
        assert not isinstance(claim, Busy | Stored)
        with claim:
            bench.runner.before = takes_long
            working = asyncio.create_task(compute(bench, job, within_s=40.0))
            while len(bench.runner.computed) < 2:
                await asyncio.sleep(0.002)
        await working
        assert len(bench.runner.computed) == 3

    monkeypatch.setattr("prefill_service.jobs.own_pool.time", Clock)
    run(body)


def test_the_end_lets_waiting_jobs_go(tmp_path: Path) -> None:
    bench = FakeWorker(tmp_path, room=ROOM)

    async def body() -> None:
        with held_writes():
            await compute(bench, bench.job(1, 1))
            waiting = await waiting_for_room(bench)
            stopping = asyncio.create_task(bench.computer.stop())
            with pytest.raises(Unavailable, match="shutting down"):
                await waiting
        await stopping
        assert bench.store.stats().entries == 1

    run(body)
    bench.idle()
    bench.store.close()


def test_context_that_left_the_pool_is_read_from_where_it_waits_to_be_stored(tmp_path: Path) -> None:
    """The store takes its time; who attends to what was computed does not wait for it."""
    staged = FakeWorker(tmp_path, staged=2**20)

    async def body() -> None:
        with held_writes():
            first = staged.job(5, 6)
            await compute(staged, first)
            while not await staged.device.run(lambda: staged.residents.evict(first.key), StageTimer(), TENANT):
                await asyncio.sleep(0.002)  # it is being copied
            job = staged.job(7, context=(first.chunk_id,))
            progress = await compute(staged, job)
            assert progress.tokens(job) == {KVSource.DEVICE: 2, KVSource.COMPUTED: 1}
            assert [ids for ids, _ in staged.runner.computed] == [(5, 6), (7,)] and not progress.all_stored
            chunk = staged.residents.find(first.key)
            assert chunk is not None and chunk.ready
            planes = staged.residents.pool.run_planes(chunk.run, chunk.tokens)
            now = b"".join(plane.contiguous().numpy().tobytes() for plane in planes)
        assert staged.publisher.flush(30) and staged.stored(first) == now

    run(body)
    staged.loads_idle()
    staged.close()
