"""One PrefillChunk from request to result: register in a store thread, compute on the device thread, wait for
other workers in between. Plain values, no protobuf."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from chunk_store.errors import StoreError
from chunk_store.key import ChunkId
from chunk_store.store import ChunkStore, DeleteReport
from chunk_store.tenant import Tenant
from engine.kv.source import KVSource
from prefill_service.jobs.computer import ChunkComputer, ChunkMade, JobProgress
from prefill_service.jobs.resolver import ChunkRequest, CompositionRequest, PrefillJob, Resolver
from prefill_service.metrics import PrefillMetrics
from prefill_service.worker import DeviceQueue, thread_result
from serving.errors import Unavailable
from serving.tenancy.text_lanes import TextLanes
from serving.trace.stages import Stage, StageTimer

log = logging.getLogger(__name__)

STORE_THREADS = 4
BUSY_WAIT_S_MAX = 120.0

T = TypeVar("T")


@dataclass(frozen=True)
class PrefillResult:
    """What became of a job; tokens of the chunk and of the context that it depends on."""

    job: PrefillJob
    computed_tokens: int
    reused_tokens: int
    spent_ns: dict[Stage, int]


class PrefillJobs:
    """Used from one event loop; the pool is touched by the device thread only."""

    def __init__(
        self,
        resolver: Resolver,
        computer: ChunkComputer,
        store: ChunkStore,
        metrics: PrefillMetrics,
        *,
        jobs_max: int,
        busy_wait_s_max: float = BUSY_WAIT_S_MAX,
    ) -> None:
        self.resolver = resolver
        self.computer = computer
        self.store = store
        self.metrics = metrics
        self.queue = DeviceQueue(jobs_max, resolver.quotas)
        self.busy_wait_s_max = busy_wait_s_max
        self._store_threads = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="store")
        self._lanes = TextLanes()
        self._named: Counter[tuple[Tenant, ChunkId]] = Counter()  # by jobs that run
        self._running: set[asyncio.Task[None]] = set()  # each has a place in the queue

    async def in_store_thread(self, call: Callable[[], T]) -> T:
        """Runs a store call, or anything that may block, off the event loop."""
        context = contextvars.copy_context()
        return await asyncio.wrap_future(self._store_threads.submit(context.run, call))

    async def register(self, request: ChunkRequest, timer: StageTimer) -> PrefillJob:
        """Takes a place for the request, or is refused at once; then registers its content.

        What it returns must be given to ``run``, which gives the place back. Raises ``RequestError`` and what stores
        raise; it leaves no place taken then.
        """
        with self._place(request.tenant):
            async with self._lanes.lane(len(request.text or "")):
                return await self.in_store_thread(lambda: self.resolver.register(request, timer))

    async def compose(self, request: CompositionRequest, timer: StageTimer) -> PrefillJob:
        """The same for a composition of registered chunks; what it returns must be given to ``walk``."""
        with self._place(request.tenant):
            return await self.in_store_thread(lambda: self.resolver.compose(request, timer))

    @contextmanager
    def _place(self, tenant: Tenant) -> Iterator[None]:
        """A place in the line, which is given back if the block fails. Raises ``Overloaded`` without one."""
        self.queue.take_place(tenant)
        try:
            yield
        except BaseException:
            self.queue.leave_place(tenant)
            raise

    async def walk(self, job: PrefillJob, timer: StageTimer) -> AsyncGenerator[ChunkMade, None]:
        """Yields each wanted chunk once it is made, while the rest are computed. Raises as ``run`` does.

        Left early, it is cancelled as ``run`` is.
        """
        loop = asyncio.get_running_loop()
        made: asyncio.Queue[ChunkMade | None] = asyncio.Queue()  # bounded by the job's chunks

        def tell(each: ChunkMade) -> None:
            if each.index in job.wanted:
                loop.call_soon_threadsafe(made.put_nowait, each)

        work = asyncio.create_task(self.run(job, timer, tell))
        work.add_done_callback(lambda _: made.put_nowait(None))
        try:
            while (each := await made.get()) is not None:
                yield each
            await work
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def run(
        self, job: PrefillJob, timer: StageTimer, tell: Callable[[ChunkMade], None] = lambda _: None
    ) -> PrefillResult:
        """Returns when the job's KV is stored. Raises ``RequestError``, ``PoolFull`` and what stores raise; what the
        request registered is then taken back. ``tell`` is told of each chunk, in any thread.

        Cancelled, it returns at once, while the device thread goes on to the end of the chunk it computes, no
        further: until then the job keeps its place, and what is computed is counted.
        """
        progress = JobProgress(timer, tell)
        work = asyncio.create_task(self._work(job, progress))
        self._running.add(work)
        self._named.update(_chunks_of(job))
        work.add_done_callback(partial(self._ended, job, progress))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            progress.cancelled.set()
            work.cancel()
            raise
        except Exception:
            await self._withdraw(job)
            raise
        tokens = progress.tokens(job)
        reused_tokens = tokens[KVSource.STORE] + tokens[KVSource.DEVICE]
        return PrefillResult(job, tokens[KVSource.COMPUTED], reused_tokens, timer.spent_ns())

    async def _withdraw(self, job: PrefillJob) -> None:
        """Takes back what a request registered that then failed: it leaves nothing behind that others do not use."""
        place = ([job.chunk_id], [job.tenant])
        if not job.newly_registered or self._named[job.tenant, job.chunk_id]:
            return

        def forget() -> None:
            if not self.store.list_entries(*place):
                self.store.delete_chunks(*place)

        try:
            await self.in_store_thread(forget)
        except StoreError as error:
            log.warning("chunk %s stays registered, though its KV could not be made: %s", job.chunk_id, error)

    def _ended(self, job: PrefillJob, progress: JobProgress, work: asyncio.Task[None]) -> None:
        """The job has ended, and no thread touches its progress any more."""
        self._running.discard(work)
        self._named.subtract(_chunks_of(job))
        self._named += Counter()  # only what is named still
        self.queue.leave_place(job.tenant)
        if not work.cancelled():
            work.exception()  # looked at, for nobody may wait for it any more
        self.metrics.tokens_made(progress.tokens(job))
        self.metrics.misses_met(progress.misses.values())

    async def _work(self, job: PrefillJob, progress: JobProgress) -> None:
        """Ends when no thread works for it any more, also when it is cancelled."""
        deadline = time.monotonic() + self.busy_wait_s_max
        looking = self._store_threads.submit(contextvars.copy_context().run, self.computer.find_missing, job, progress)
        if not await thread_result(looking):
            return
        while True:
            wait_s = await self.queue.run(lambda: self.computer.attempt(job, progress), progress.timer, job.tenant)
            if wait_s is None:
                return
            if time.monotonic() + wait_s > deadline:
                raise Unavailable(
                    f"another worker has not finished the KV that this chunk needs within {self.busy_wait_s_max:g} s",
                    remedy="try again",
                )
            await asyncio.sleep(wait_s)

    async def delete(self, chunk_id: ChunkId, tenant: Tenant) -> DeleteReport:
        """Deletes a tenant's chunk with its KV, also from the pool where no running job holds it."""
        entries = await self.in_store_thread(lambda: self.store.list_entries([chunk_id], [tenant]))
        report = await self.in_store_thread(lambda: self.store.delete_chunks([chunk_id], [tenant]))
        keys = [entry.key for entry in entries]
        await self.queue.run(lambda: [self.computer.residents.evict(key) for key in keys], StageTimer(), tenant)
        return report

    async def stop(self) -> None:
        """Waits for the threads to end what they do."""
        await asyncio.to_thread(self.queue.close)
        await asyncio.to_thread(self._store_threads.shutdown, wait=True, cancel_futures=True)
        await asyncio.gather(*self._running, return_exceptions=True)


def _chunks_of(job: PrefillJob) -> list[tuple[Tenant, ChunkId]]:
    """The chunks that a job is about: one tenant's jobs say nothing of another's chunks."""
    return [(job.tenant, name) for name in job.chunk_ids]
