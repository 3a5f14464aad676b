"""One PrefillChunk from request to result: register in a store thread, compute on the device thread, wait for
other workers in between. Plain values, no protobuf."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from grpc import StatusCode

from chunk_store.key import ChunkId
from chunk_store.store import ChunkStore, DeleteReport
from prefill_service.computer import Computer, Progress, Source
from prefill_service.device_queue import DeviceQueue, ended
from prefill_service.metrics import PrefillMetrics
from prefill_service.requests import ChunkRequest, Job, Registrar
from serving.errors import RequestError
from serving.stages import StageTimer

STORE_THREADS = 4
BUSY_WAIT_S_MAX = 120.0

T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """What became of a job; tokens of the chunk and of the context that it depends on."""

    job: Job
    computed_tokens: int
    reused_tokens: int
    spent_ns: dict[str, int]


class Prefiller:
    """Used from one event loop; the pool is touched by the device thread only."""

    def __init__(
        self,
        registrar: Registrar,
        computer: Computer,
        store: ChunkStore,
        metrics: PrefillMetrics,
        *,
        jobs_max: int,
        busy_wait_s_max: float = BUSY_WAIT_S_MAX,
    ) -> None:
        self.registrar = registrar
        self.computer = computer
        self.store = store
        self.metrics = metrics
        self.queue = DeviceQueue(jobs_max)
        self.busy_wait_s_max = busy_wait_s_max
        self._store_threads = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="store")
        self._works: set[asyncio.Task[Made]] = set()  # bounded by the queue's places and what the caller bounds

    async def in_store_thread(self, call: Callable[[], T]) -> T:
        """Runs a store call, or anything that may block, off the event loop."""
        context = contextvars.copy_context()
        return await asyncio.wrap_future(self._store_threads.submit(context.run, call))

    async def register(self, request: ChunkRequest, timer: StageTimer) -> Job:
        """Registers the request's content. Raises ``RequestError`` and what stores raise."""
        return await self.in_store_thread(lambda: self.registrar.register(request, timer))

    async def make(self, job: Job, timer: StageTimer) -> Made:
        """Returns when the job's KV is stored. Raises ``RequestError``, ``PoolFull`` and what stores raise.

        Cancelled, it returns at once, while the device thread goes on to the end of the chunk it computes, no
        further: until then the job keeps its place, and what is computed is counted.
        """
        progress = Progress(timer)
        work = asyncio.create_task(self._work(job, progress))
        self._works.add(work)
        work.add_done_callback(self._forget)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            progress.cancelled.set()
            work.cancel()
            raise

    def _forget(self, work: asyncio.Task[Made]) -> None:
        self._works.discard(work)
        if not work.cancelled():
            work.exception()  # looked at, for nobody may wait for it any more

    async def _work(self, job: Job, progress: Progress) -> Made:
        """Ends when no thread touches the job's progress any more."""
        try:
            with self.queue.place():
                await self._make(job, progress)
        finally:
            tokens = progress.tokens(job)
            self.metrics.tokens_made(tokens)
            self.metrics.misses_met(progress.misses.values())
        return Made(
            job, tokens[Source.COMPUTED], tokens[Source.STORE] + tokens[Source.DEVICE], progress.timer.spent_ns()
        )

    async def _make(self, job: Job, progress: Progress) -> None:
        deadline = time.monotonic() + self.busy_wait_s_max
        looking = self._store_threads.submit(contextvars.copy_context().run, self.computer.find_missing, job, progress)
        if not await ended(looking):
            return
        while True:
            wait_s = await self.queue.run(lambda: self.computer.attempt(job, progress), progress.timer)
            if wait_s is None:
                return
            if time.monotonic() + wait_s > deadline:
                raise RequestError(
                    StatusCode.UNAVAILABLE,
                    f"another worker has not finished the KV that this chunk needs within {self.busy_wait_s_max:g} s; "
                    "try again",
                )
            await asyncio.sleep(wait_s)

    async def delete(self, chunk_id: ChunkId) -> DeleteReport:
        """Deletes a chunk with its KV, also from the pool where no running job holds it."""
        entries = await self.in_store_thread(lambda: self.store.list_entries([chunk_id]))
        report = await self.in_store_thread(lambda: self.store.delete_chunks([chunk_id]))
        keys = [entry.key for entry in entries]
        await self.queue.run(lambda: [self.computer.residents.evict(key) for key in keys], StageTimer())
        return report

    async def stop(self) -> None:
        """Waits for the threads to end what they do."""
        await asyncio.to_thread(self.queue.close)
        await asyncio.to_thread(self._store_threads.shutdown, wait=True, cancel_futures=True)
        await asyncio.gather(*self._works, return_exceptions=True)
