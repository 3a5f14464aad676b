"""One PrefillChunk from request to result: register in a store thread, have it computed, wait until it is stored
where that is asked for. Plain values, no protobuf."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from chunk_store.errors import ClaimLost, StoreError
from chunk_store.key import ChunkId
from chunk_store.store import ChunkStore, DeleteReport
from chunk_store.tenant import Tenant
from engine.kv.source import KVSource
from prefill_service.jobs.computer import ChunkComputer
from prefill_service.jobs.progress import ChunkMade, JobProgress
from prefill_service.jobs.resolver import ChunkRequest, CompositionRequest, PrefillJob, Resolver
from prefill_service.metrics import PrefillMetrics
from prefill_service.worker import JobLine, all_ended, thread_result
from serving.errors import Overloaded, Unavailable
from serving.tenancy.text_lanes import TextLanes
from serving.trace.stages import Stage, StageTimer

log = logging.getLogger(__name__)

STORE_THREADS = 4
BUSY_WAIT_S_MAX = 120.0

T = TypeVar("T")


@dataclass(frozen=True)
class PrefillResult:
    """What became of a job; tokens of the chunk and of the context that it depends on.

    ``durable``: the store has all of it now.
    """

    job: PrefillJob
    computed_tokens: int
    reused_tokens: int
    spent_ns: dict[Stage, int]
    durable: bool


class PrefillJobs:
    """Used from one event loop. With ``durable`` every job ends only when its KV is stored, not just those that ask."""

    def __init__(
        self,
        resolver: Resolver,
        computer: ChunkComputer,
        store: ChunkStore,
        metrics: PrefillMetrics,
        *,
        jobs_max: int,
        durable: bool = False,
        busy_wait_s_max: float = BUSY_WAIT_S_MAX,
    ) -> None:
        self.resolver = resolver
        self.computer = computer
        self.store = store
        self.metrics = metrics
        self.queue = JobLine(jobs_max, resolver.quotas)
        self.durable = durable
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

        work = asyncio.create_task(self._run(job, timer, tell))
        work.add_done_callback(lambda _: made.put_nowait(None))
        try:
            while (each := await made.get()) is not None:
                yield each
            await work
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def run(self, job: PrefillJob, timer: StageTimer) -> PrefillResult:
        """Returns when the job's KV is there: computed, or stored where the job is durable.

        Raises ``RequestError``, ``PoolFull`` and what stores raise; what the request registered is then taken back.

        Cancelled, it returns at once, while the device thread goes on to the end of the chunk it computes, no
        further: until then the job keeps its place, and what is computed is counted. What is computed is stored.
        """
        try:
            progress = await self._run(job, timer, lambda _: None)
            for refused in progress.unpublished.values():
                raise refused
        except Exception:
            await self._withdraw(job)
            raise
        tokens = progress.tokens(job)
        reused_tokens = tokens[KVSource.STORE] + tokens[KVSource.DEVICE]
        return PrefillResult(
            job, tokens[KVSource.COMPUTED], reused_tokens, timer.spent_ns(), durable=progress.all_stored
        )

    async def _run(self, job: PrefillJob, timer: StageTimer, tell: Callable[[ChunkMade], None]) -> JobProgress:
        """``run`` without its end; ``tell`` is told of each chunk, in any thread, and of those the store refuses."""
        progress = JobProgress(timer, tell, durable=self.durable or job.durable)
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
        return progress

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
        patience_s = self.busy_wait_s_max
        looking = self._store_threads.submit(contextvars.copy_context().run, self.computer.find_missing, job, progress)
        if not await thread_result(looking):
            return
        since, came = time.monotonic(), progress.came
        while True:
            await self.computer.compute(job, progress, time.monotonic() + patience_s)
            if not await self._settled(progress, time.monotonic() + patience_s):
                return
            if progress.came > came:
                since, came = time.monotonic(), progress.came
            elif time.monotonic() > since + patience_s:
                raise Unavailable(
                    "this request's KV loses its claims, or its room in the pool, again and again", remedy="try again"
                )

    async def _settled(self, progress: JobProgress, deadline: float) -> bool:
        """Waits until what was launched is computed, or stored where the job is durable.

        True if some is to be made again: its claim was lost, or it left the pool before there was room to write it.
        Raises ``Unavailable`` at ``deadline``, and what is wrong with the device or with us.
        """
        publishing = dict(progress.publishing)
        with progress.timer.stage("prefill"):
            await self._ended_by([each.computed for each in publishing.values()], deadline)
        for each in publishing.values():
            each.computed.result()
        if not progress.durable:
            return False
        with progress.timer.stage("publish"):
            await self._ended_by(publishing.values(), deadline)
        lost = False
        for index, each in publishing.items():
            error = each.exception()
            if error is None:
                progress.stored(index)
            elif isinstance(error, ClaimLost | Overloaded):
                del progress.publishing[index]  # it is resident, or computed again
                lost = True
            elif isinstance(error, StoreError):
                progress.refused(index, error)
            else:
                raise error
        return lost

    async def _ended_by(self, futures: Iterable[Future[Any]], deadline: float) -> None:
        """Waits for what threads do. Raises ``Unavailable`` at ``deadline``."""
        if not await all_ended(futures, deadline - time.monotonic()):
            raise Unavailable(
                f"the store has not taken the KV of this chunk within {self.busy_wait_s_max:g} s", remedy="try again"
            )

    async def delete(self, chunk_id: ChunkId, tenant: Tenant) -> DeleteReport:
        """Deletes a tenant's chunk with its KV, also from the pool where no running job holds it.

        What is on its way into the store from here arrives there before.
        """
        deadline = time.monotonic() + self.busy_wait_s_max
        await self._ended_by(self.computer.publishing_of(chunk_id, tenant), deadline)
        entries = await self.in_store_thread(lambda: self.store.list_entries([chunk_id], [tenant]))
        report = await self.in_store_thread(lambda: self.store.delete_chunks([chunk_id], [tenant]))
        await self.computer.evict([entry.key for entry in entries], tenant)
        return report

    async def stop(self) -> None:
        """Waits for the threads to end what they do."""
        await self.computer.stop()
        await asyncio.to_thread(self._store_threads.shutdown, wait=True, cancel_futures=True)
        await asyncio.gather(*self._running, return_exceptions=True)


def _chunks_of(job: PrefillJob) -> list[tuple[Tenant, ChunkId]]:
    """The chunks that a job is about: one tenant's jobs say nothing of another's chunks."""
    return [(job.tenant, name) for name in job.chunk_ids]
