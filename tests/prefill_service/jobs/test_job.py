"""Jobs from request to result: places, waiting for other workers, cancelling, and what a failure takes back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from chunk_store.entry import EntryInfo
from chunk_store.errors import ClaimLost, StoreError, StoreFull, StoreUnavailable
from chunk_store.publication import SharedPublication
from chunk_store.store import Busy, Stored
from chunk_store.tenant import tenant_of
from prefill_service.jobs.job import PrefillJobs
from prefill_service.jobs.progress import ChunkMade
from prefill_service.jobs.resolver import ChunkRequest, CompositionRequest, PrefillJob
from prefill_service.metrics import PrefillMetrics
from serving.errors import NotFound, Overloaded, Unavailable
from serving.trace.stages import StageTimer
from tests.fakes import LAYOUT
from tests.prefill_service.fake_worker import FakeWorker, held_writes

TENANT = tenant_of("")


class Jobs:
    def __init__(self, root: Path, *, jobs_max: int = 4, room: int | None = None) -> None:
        self.worker = FakeWorker(root, room=room)
        self.metrics = PrefillMetrics("tiny")
        w = self.worker
        self.jobs = PrefillJobs(w.resolver, w.computer, w.store, self.metrics, jobs_max=jobs_max, busy_wait_s_max=20.0)

    def tokens(self, source: str) -> float | None:
        labels = {"model_name": "tiny", "source": source}
        return self.metrics.registry.get_sample_value("cairn_prefill_tokens_total", labels)

    async def prefill(self, *ids: int, context: tuple[str, ...] = ()) -> tuple[int, int]:
        timer = StageTimer()
        result = await self.jobs.run(await self.register(*ids, context=context), timer)
        assert result.durable
        return result.computed_tokens, result.reused_tokens

    async def register(self, *ids: int, context: tuple[str, ...] = (), durable: bool = True) -> PrefillJob:
        return await self.jobs.register(ChunkRequest(token_ids=ids, context=context, durable=durable), StageTimer())

    def run(self, body: Callable[[], Awaitable[None]]) -> None:
        async def main() -> None:
            try:
                await body()
            finally:
                await self.jobs.stop()
            await asyncio.sleep(0)
            assert self.jobs.queue.jobs == 0 and not self.jobs._named
            self.worker.idle()

        asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    made = Jobs(tmp_path)
    yield made
    made.worker.close()


@pytest.fixture
def other(jobs: Jobs, tmp_path: Path) -> Iterator[FakeWorker]:
    made = FakeWorker(tmp_path)
    yield made
    made.close()


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.002)


def test_tokens_are_computed_once_and_counted_by_source(jobs: Jobs) -> None:
    async def body() -> None:
        assert await jobs.prefill(5, 6) == (2, 0)
        assert await jobs.prefill(5, 6) == (0, 2)
        assert (jobs.tokens("computed"), jobs.tokens("store")) == (2, 2)
        assert jobs.worker.runner.threads == {"device_0"}

    jobs.run(body)


def test_what_another_worker_is_about_to_store_is_waited_for(jobs: Jobs, other: FakeWorker) -> None:
    async def body() -> None:
        job = other.job(5, 6)
        claim = other.store.begin(job.key)
        assert not isinstance(claim, Busy | Stored)
        with claim:
            waiting = asyncio.create_task(jobs.prefill(5, 6))
            await until(lambda: jobs.jobs.queue.jobs == 1)
            done, _ = await asyncio.wait([waiting], timeout=0.05)
            assert not done
        assert await waiting == (2, 0)

    jobs.run(body)


def test_waiting_for_another_worker_has_an_end(jobs: Jobs, other: FakeWorker) -> None:
    async def body() -> None:
        jobs.jobs.busy_wait_s_max = 0.0
        job = other.job(5, 6)
        claim = other.store.begin(job.key)
        assert not isinstance(claim, Busy | Stored)
        with claim, pytest.raises(Unavailable, match="another worker has not finished"):
            await jobs.prefill(5, 6)

    jobs.run(body)


def test_a_place_is_taken_before_anything_is_done_and_given_back_by_a_refusal(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, jobs_max=1)

    async def body() -> None:
        with pytest.raises(NotFound):
            await jobs.register(1, context=("feed",))
        held = await jobs.register(5)
        with pytest.raises(Overloaded):
            await jobs.register(6)
        await jobs.jobs.run(held, StageTimer())
        assert await jobs.prefill(6) == (1, 0)
        assert jobs.worker.store.stats().records == 2

    jobs.run(body)
    jobs.worker.close()


def test_a_failure_takes_back_what_only_its_request_registered(jobs: Jobs) -> None:
    async def body() -> None:
        known = await jobs.register(9)
        await jobs.jobs.run(known, StageTimer())
        records = jobs.worker.store.stats().records

        def fail() -> None:
            raise RuntimeError("device")

        jobs.worker.runner.before = fail
        with pytest.raises(RuntimeError, match="device"):
            await jobs.prefill(5, 6)
        with pytest.raises(RuntimeError, match="device"):
            await jobs.prefill(7, context=(known.chunk_id,))
        assert jobs.worker.store.stats().records == records == 1

    jobs.run(body)


def test_a_failure_leaves_what_another_job_is_about(jobs: Jobs) -> None:
    async def body() -> None:
        first = await jobs.register(5, 6)
        second = await jobs.register(5, 6)
        assert first.newly_registered and not second.newly_registered
        entered, release = threading.Event(), threading.Event()

        def hold() -> None:
            entered.set()
            assert release.wait(20)
            jobs.worker.runner.before = lambda: None
            raise RuntimeError("device")

        jobs.worker.runner.before = hold
        failing = asyncio.create_task(jobs.jobs.run(first, StageTimer()))
        assert await asyncio.to_thread(entered.wait, 20)
        following = asyncio.create_task(jobs.jobs.run(second, StageTimer()))
        await asyncio.sleep(0)
        release.set()
        with pytest.raises(RuntimeError, match="device"):
            await failing
        assert (await following).computed_tokens == 2
        assert jobs.worker.store.get_records([first.chunk_id], [TENANT])[0] is not None

    jobs.run(body)


def test_cancelled_it_returns_at_once_and_keeps_its_place_to_the_chunks_end(jobs: Jobs) -> None:
    async def body() -> None:
        entered, release = threading.Event(), threading.Event()

        def hold() -> None:
            entered.set()
            assert release.wait(20)

        first = await jobs.register(5, 6)
        jobs.jobs.queue.leave_place(first.tenant)
        jobs.worker.runner.before = hold
        running = asyncio.create_task(jobs.prefill(7, context=(first.chunk_id,)))
        assert await asyncio.to_thread(entered.wait, 20)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert jobs.jobs.queue.jobs == 1 and jobs.tokens("computed") == 0
        release.set()
        await until(lambda: jobs.jobs.queue.jobs == 0)
        assert jobs.tokens("computed") == 2, "the chunk that ran is counted, the next did not begin"
        assert len(jobs.worker.runner.computed) == 1

    jobs.run(body)


def test_deleting_takes_it_from_the_store_and_the_pool(jobs: Jobs) -> None:
    async def body() -> None:
        job = await jobs.register(5, 6)
        await jobs.jobs.run(job, StageTimer())
        assert len(jobs.worker.residents) == 1
        report = await jobs.jobs.delete(job.chunk_id, TENANT)
        assert (report.records, report.entries, len(jobs.worker.residents)) == (1, 1, 0)

    jobs.run(body)


def test_a_job_that_need_not_be_durable_ends_when_it_is_computed(jobs: Jobs) -> None:
    async def body() -> None:
        with held_writes():
            job = await jobs.register(5, 6, durable=False)
            result = await jobs.jobs.run(job, StageTimer())
            assert (result.computed_tokens, result.durable) == (2, False)
            assert jobs.worker.store.lookup([job.key]) == [None]
            waiting = asyncio.create_task(jobs.prefill(5, 6))
            done, _ = await asyncio.wait([waiting], timeout=0.05)
            assert not done, "one that is to be durable waits for it"
        assert await waiting == (0, 2)
        assert (await jobs.jobs.run(await jobs.register(5, 6, durable=False), StageTimer())).durable

    jobs.run(body)


def test_of_a_composition_each_chunk_is_told_when_it_can_be_used(jobs: Jobs) -> None:
    async def body() -> None:
        ids = [(await jobs.register(name)).chunk_id for name in (5, 6, 7)]
        for _ in ids:
            jobs.jobs.queue.leave_place(TENANT)
        with held_writes():
            request = CompositionRequest(tuple(ids), (0, 1, 2))
            walk = jobs.jobs.walk(await jobs.jobs.compose(request, StageTimer()), StageTimer())
            assert [(made.index, made.durable) async for made in walk] == [(0, False), (1, False), (2, False)]
            request = CompositionRequest(tuple(ids), (1, 2), durable=True)
            job = await jobs.jobs.compose(request, StageTimer())

            async def all_made() -> list[ChunkMade]:
                return [made async for made in jobs.jobs.walk(job, StageTimer())]

            durable = asyncio.create_task(all_made())
            done, _ = await asyncio.wait([durable], timeout=0.05)
            assert not done
        assert sorted((made.index, made.durable) for made in await durable) == [(1, True), (2, True)]

    jobs.run(body)


@pytest.mark.parametrize("error", [StoreFull("full"), StoreUnavailable("gone")], ids=["full", "unavailable"])
def test_a_store_that_takes_nothing_fails_what_is_to_be_durable_alone(
    jobs: Jobs, error: StoreError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    async def body() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(SharedPublication, "write", refuse)
            first = await jobs.register(5, 6, durable=False)
            assert not (await jobs.jobs.run(first, StageTimer())).durable
            assert jobs.worker.publisher.flush(30)
            with pytest.raises(type(error)):
                await jobs.prefill(5, 6)
            with pytest.raises(type(error)):
                await jobs.prefill(9)
            request = CompositionRequest((first.chunk_id,), (0,), durable=True)
            walk = jobs.jobs.walk(await jobs.jobs.compose(request, StageTimer()), StageTimer())
            assert [(made.index, made.durable, made.unpublished) async for made in walk] == [(0, False, error)]
        assert len(jobs.worker.runner.computed) == 2, "what is resident is not computed again"
        records = jobs.worker.store.stats().records
        assert records == 1, "what a failed request registered is taken back, what another was answered for stays"
        assert await jobs.prefill(5, 6) == (0, 2)

    jobs.run(body)


def test_a_lost_claim_is_taken_again_and_nothing_is_computed_twice(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, lost = SharedPublication.commit, [ClaimLost("taken")]

    def lose_once(self: SharedPublication) -> EntryInfo:
        if lost:
            self.abort()
            raise lost.pop()
        return commit(self)

    async def body() -> None:
        monkeypatch.setattr(SharedPublication, "commit", lose_once)
        assert await jobs.prefill(5, 6) == (2, 0)
        assert not lost and len(jobs.worker.runner.computed) == 1

    jobs.run(body)


def test_a_full_queue_holds_back_what_would_be_computed_until_its_deadline(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, room=LAYOUT.nbytes(2))

    async def body() -> None:
        with held_writes():
            await jobs.jobs.run(await jobs.register(5, 6, durable=False), StageTimer())
            jobs.jobs.busy_wait_s_max = 0.05
            with pytest.raises(Overloaded, match="wait to be written"):
                await jobs.jobs.run(await jobs.register(7, 8, durable=False), StageTimer())
            jobs.jobs.busy_wait_s_max = 20.0
            cancelled = asyncio.create_task(jobs.jobs.run(await jobs.register(7, 8, durable=False), StageTimer()))
            await until(lambda: jobs.worker.publisher.room._asked)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            waiting = asyncio.create_task(jobs.jobs.run(await jobs.register(8, 8, durable=False), StageTimer()))
            await until(lambda: jobs.worker.publisher.room._asked)
            assert len(jobs.worker.runner.computed) == 1
        assert (await waiting).computed_tokens == 2

    jobs.run(body)
    jobs.worker.close()


def test_what_is_deleted_while_it_is_written_does_not_come_back(jobs: Jobs) -> None:
    async def body() -> None:
        with held_writes():
            job = await jobs.register(5, 6, durable=False)
            await jobs.jobs.run(job, StageTimer())
            deleting = asyncio.create_task(jobs.jobs.delete(job.chunk_id, TENANT))
            done, _ = await asyncio.wait([deleting], timeout=0.05)
            assert not done
        report = await deleting
        assert (report.records, report.entries, len(jobs.worker.residents)) == (1, 1, 0)
        assert jobs.worker.store.stats().entries == 0

    jobs.run(body)


def test_the_end_writes_out_what_is_computed(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)

    async def body() -> None:
        with held_writes():
            for name in (5, 6, 7):
                await jobs.jobs.run(await jobs.register(name, durable=False), StageTimer())

    jobs.run(body)
    assert jobs.worker.store.stats().entries == 3
    jobs.worker.close()
