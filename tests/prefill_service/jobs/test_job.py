"""Jobs from request to result: places, waiting for other workers, cancelling, and what a failure takes back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from chunk_store.store import Busy, Stored
from chunk_store.tenant import tenant_of
from prefill_service.jobs.job import PrefillJobs
from prefill_service.jobs.resolver import ChunkRequest
from prefill_service.metrics import PrefillMetrics
from serving.errors import NotFound, Overloaded, Unavailable
from serving.trace.stages import StageTimer
from tests.prefill_service.fake_worker import FakeWorker

TENANT = tenant_of("")


class Jobs:
    def __init__(self, root: Path, *, jobs_max: int = 4) -> None:
        self.worker = FakeWorker(root)
        self.metrics = PrefillMetrics("tiny")
        w = self.worker
        self.jobs = PrefillJobs(w.resolver, w.computer, w.store, self.metrics, jobs_max=jobs_max, busy_wait_s_max=20.0)

    def tokens(self, source: str) -> float | None:
        labels = {"model_name": "tiny", "source": source}
        return self.metrics.registry.get_sample_value("cairn_prefill_tokens_total", labels)

    async def prefill(self, *ids: int, context: tuple[str, ...] = ()) -> tuple[int, int]:
        timer = StageTimer()
        result = await self.jobs.run(await self.register(*ids, context=context), timer)
        return result.computed_tokens, result.reused_tokens

    async def register(self, *ids: int, context: tuple[str, ...] = ()):
        return await self.jobs.register(ChunkRequest(token_ids=ids, context=context), StageTimer())

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
    made.worker.store.close()


@pytest.fixture
def other(jobs: Jobs, tmp_path: Path) -> Iterator[FakeWorker]:
    made = FakeWorker(tmp_path)
    yield made
    made.store.close()


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
    jobs.worker.store.close()


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
