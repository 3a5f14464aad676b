"""Chunks computed on a device of one's own: its thread, its pool, and the publisher that empties it into the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial

from chunk_store.errors import ClaimLost
from chunk_store.key import ChunkId, ChunkKey
from chunk_store.store import ChunkStore
from chunk_store.tenant import Tenant
from engine.kv.resident import PoolFull, ResidentChunk, ResidentChunks
from engine.reuse import KeyedChunk
from engine.run.protocol import Runner
from engine.served import ServedModel
from prefill_service.jobs.attempt import Attempt, BusyFor, EndOf, LoadOf, RoomFor, Wait
from prefill_service.jobs.computer import find_missing
from prefill_service.jobs.loads import PoolLoads, Reading
from prefill_service.jobs.progress import JobProgress
from prefill_service.jobs.resolver import PrefillJob
from prefill_service.worker import DeviceThread, all_ended
from serving.errors import Unavailable
from serving.handover.lender import Lender
from serving.publishing.item import Publishing
from serving.publishing.publisher import Publisher, queue_full
from serving.publishing.room import Place
from serving.store.heartbeat import TTL_S, heartbeat
from serving.trace.stages import StageTimer

CLAIM_LOST_RETRY_S = 0.05
POOL_FULL_RETRY_S = 0.02
DRAIN_S_DEFAULT = 30.0


class OwnPool:
    """A ``ChunkComputer`` with a device thread of its own: nothing else touches ``residents``.

    ``lender`` hands chunks over on this host.
    """

    def __init__(
        self,
        served: ServedModel,
        runner: Runner,
        residents: ResidentChunks,
        store: ChunkStore,
        device: DeviceThread,
        publisher: Publisher,
        *,
        lender: Lender | None = None,
        drain_s: float = DRAIN_S_DEFAULT,
    ) -> None:
        self.served = served
        self.runner = runner
        self.residents = residents
        self.loads = PoolLoads(residents, store, device.post, publisher.read)
        self.store = store
        self.device = device
        self.publisher = publisher
        self.lender = lender
        self._drain_s = drain_s
        self._loading = asyncio.Lock()

    def find_missing(self, job: PrefillJob, progress: JobProgress) -> list[int]:
        """See ``ChunkComputer``."""
        return find_missing(self.store, self.publisher, self.served, job, progress)

    async def compute(self, job: PrefillJob, progress: JobProgress, deadline: float) -> None:
        """See ``ChunkComputer``."""
        places: list[Place] = []
        patience_s, came = deadline - time.monotonic(), progress.came
        try:
            while True:
                attempt = partial(self.attempt, job, progress, places)
                wait = await self.device.run(attempt, progress.timer, job.tenant)
                while isinstance(wait, LoadOf):
                    wait = await self._load(wait.indices, job, progress, places, deadline)
                if wait is None:
                    return
                if progress.came > came:
                    deadline, came = time.monotonic() + patience_s, progress.came
                with progress.timer.stage("publish") if isinstance(wait, RoomFor | EndOf) else nullcontext():
                    await self._waited(wait, places, deadline)
        finally:
            for place in places:
                place.give_back()

    def attempt(self, job: PrefillJob, progress: JobProgress, places: list[Place]) -> Wait | None:
        """Goes through the job once, in the device thread. None when all is stored or handed on.

        ``places`` is room in the queue that was waited for; it takes from it what it needs. Raises ``JobCancelled``,
        ``PoolFull`` and what stores raise.
        """
        self.loads.settle()
        keys = [job.chunks[index].key for index in job.needed]
        attempt = Attempt(self, job, progress, places)
        with self.store.lease(keys, ttl_s=TTL_S) as lease, heartbeat(lease.renew):
            try:
                return attempt.run(self.find_missing(job, progress))
            except ClaimLost:
                return BusyFor(CLAIM_LOST_RETRY_S)  # what was computed is still resident
            except PoolFull:
                attempt.release()
                if not self.residents.held:
                    raise
                return BusyFor(POOL_FULL_RETRY_S)  # what is being written, or lent, makes room soon
            finally:
                attempt.release()

    async def _load(
        self, indices: Sequence[int], job: PrefillJob, progress: JobProgress, places: list[Place], deadline: float
    ) -> Wait | None:
        """Has stored chunks read into the pool while others' rows run, then makes the next attempt.

        One job at a time: it alone keeps pages while it waits, so that no two wait for each other's.
        """
        held: list[ResidentChunk] = []
        async with self._loading:
            try:
                begin = partial(self._begin_loads, [job.chunks[index] for index in indices], held)
                readings = await self.device.run(begin, progress.timer, job.tenant)
                if readings is None:
                    return BusyFor(POOL_FULL_RETRY_S)
                with progress.timer.stage("load"):
                    if not await all_ended(readings, deadline - time.monotonic()):
                        raise Unavailable("the store has not given the KV that this chunk needs", remedy="try again")
                for index, reading in zip(indices, readings, strict=True):
                    progress.read(index, reading.result())
                attempt = partial(self._attempt_behind, held, job, progress, places)
                return await self.device.run(attempt, progress.timer, job.tenant)
            finally:
                with suppress(RuntimeError):  # the device thread has ended
                    self.device.post(partial(self._let_go, held))

    def _begin_loads(self, chunks: Sequence[KeyedChunk], held: list[ResidentChunk]) -> list[Reading] | None:
        """What is being read, ``held`` for the job; None if there is no room now. In the device thread."""
        self.loads.settle()
        try:
            readings = self.loads.begin(chunks)
        except PoolFull:
            if not self.residents.held:
                raise
            return None
        held += [chunk for each in chunks if (chunk := self.residents.acquire(each.key)) is not None]
        return readings

    def _attempt_behind(
        self, held: list[ResidentChunk], job: PrefillJob, progress: JobProgress, places: list[Place]
    ) -> Wait | None:
        """An attempt behind loads, with what was read in place; what could not be read has gone."""
        self.loads.settle()
        self._let_go([chunk for chunk in held if not chunk.ready])
        held[:] = [chunk for chunk in held if chunk.ready]
        return self.attempt(job, progress, places)

    def _let_go(self, held: Sequence[ResidentChunk]) -> None:
        for chunk in held:
            self.residents.release(chunk)

    async def _waited(self, wait: BusyFor | RoomFor | EndOf, places: list[Place], deadline: float) -> None:
        """Returns when the next attempt may do better. Raises ``RequestError`` at ``deadline``."""
        left_s = max(0.0, deadline - time.monotonic())
        if isinstance(wait, RoomFor):
            places.append(await self._room(wait.nbytes, left_s))
        elif isinstance(wait, EndOf):
            if not await all_ended([wait.publishing], left_s):
                raise queue_full(self.publisher.room)
        elif wait.seconds > left_s:
            raise Unavailable(
                "another worker has not finished the KV that this chunk needs, or what is written and lent has not "
                "made room for it, within the time that a request waits",
                remedy="try again",
            )
        else:
            await asyncio.sleep(wait.seconds)

    async def _room(self, nbytes: int, left_s: float) -> Place:
        asked = self.publisher.ask(nbytes)
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(asked)), left_s)
        except BaseException as error:
            if not asked.cancel() and asked.exception() is None:
                asked.result().give_back()
            if isinstance(error, TimeoutError):
                raise queue_full(self.publisher.room) from error
            raise

    def publishing_of(self, chunk_id: ChunkId, tenant: Tenant) -> Sequence[Publishing]:
        return self.publisher.pending_of(chunk_id, tenant)

    async def evict(self, keys: Sequence[ChunkKey], tenant: Tenant) -> None:
        await self.device.run(lambda: [self.residents.evict(key) for key in keys], StageTimer(), tenant)

    async def stop(self) -> None:
        """Lets the step that runs end and writes out what is computed; what has not begun is dropped."""
        self.device.drop()
        await asyncio.to_thread(self.loads.stop)
        await asyncio.to_thread(self.publisher.stop, self._drain_s)
        await asyncio.to_thread(self.device.close)
