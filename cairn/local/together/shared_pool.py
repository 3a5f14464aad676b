"""The prefill service's chunks, computed by the decode service's worker: in its pool, in rows of its steps.

A job becomes a request for chunks. They are resident for answers as soon as their rows are launched, and go to the
publisher that both services have.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from chunk_store.errors import StoreFull, StoreUnavailable
from chunk_store.key import ChunkId, ChunkKey, ChunkType
from chunk_store.store import Busy, ChunkStore
from chunk_store.tenant import SHARED_TENANT, Tenant
from decode_service.device.worker import DecodeWorker
from decode_service.kv_source.asking import ComputedChunk, FetchTerms
from decode_service.kv_source.claims import ChunkClaims, StoreClaim
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import RequestChunk, Segment, Unpublished
from decode_service.scheduling.sequence import AllReady, ChunkReady, Event, Failed, FinishReason
from decode_service.scheduling.sequence import Sequence as Request
from engine.kv.source import KVSource
from engine.reuse import ReuseMode
from engine.sampling.params import SamplingParams, SamplingRequest
from engine.served import ServedModel
from prefill_service.jobs.computer import find_missing
from prefill_service.jobs.progress import JobCancelled, JobProgress
from prefill_service.jobs.resolver import PrefillJob
from serving.errors import Unavailable
from serving.publishing.item import Publishing
from serving.publishing.publisher import Publisher
from serving.trace.request_id import current_request_id

NO_ANSWER = SamplingRequest(SamplingParams(max_tokens=1), (), frozenset())
LOOKUPS_AT_ONCE = 4
END_S = 10.0  # for the device thread to let go of a request that is over

T = TypeVar("T")


class SharedPool:
    """A ``ChunkComputer`` over the worker of a decode service in this process.

    ``store`` is asked what is there; ``claims`` is what the worker computes by.
    """

    def __init__(
        self,
        served: ServedModel,
        worker: DecodeWorker,
        store: ChunkStore,
        claims: ChunkClaims,
        *,
        drain_s: float,
    ) -> None:
        self.served = served
        self.worker = worker
        self.store = store
        self.claims = claims
        self._drain_s = drain_s
        self._threads = ThreadPoolExecutor(LOOKUPS_AT_ONCE, thread_name_prefix="prefill-lookup")

    @property
    def publisher(self) -> Publisher:
        return self.claims.publisher

    def find_missing(self, job: PrefillJob, progress: JobProgress) -> list[int]:
        """See ``ChunkComputer``."""
        return find_missing(self.store, self.publisher, self.served, job, progress)

    async def compute(self, job: PrefillJob, progress: JobProgress, deadline: float) -> None:
        """See ``ChunkComputer``."""
        while missing := await self._in_thread(partial(self.find_missing, job, progress)):
            if progress.cancelled.is_set():
                raise JobCancelled
            asked = _Asked(job, progress, missing, self.publisher)
            await self._bring(asked)
            gone = [chunk for chunk in asked.resident if not await self._publish(asked, chunk, deadline)]
            if not gone:
                return

    async def _bring(self, asked: _Asked) -> None:
        """Returns when the chunks can be read; what nobody waits for any more is computed no further.

        Raises ``RequestError``.
        """
        request = asked.request()
        self.worker.submit(request)
        try:
            await asyncio.shield(asked.ended)
        except asyncio.CancelledError:
            self.worker.end(request.request_id, FinishReason.ABORT, request.owner)
            await asyncio.wait([asked.ended], timeout=END_S)
            raise
        finally:
            spent = request.clock
            if spent.admitted:
                asked.progress.timer.add("queue", spent.admitted - spent.submitted)

    async def _publish(self, asked: _Asked, chunk: RequestChunk, deadline: float) -> bool:
        """Has a chunk stored that was in the pool already and is not in the store; False if it has left the pool."""
        index = asked.index_of(chunk)
        under_way = self.publisher.pending(chunk.key)
        if under_way is not None:
            asked.progress.handed_on(index, under_way)
            return True
        terms = FetchTerms("", deadline, asked.progress.cancelled.is_set, insist=True)
        claim = partial(self.claims.claim, asked.composition, chunk, terms)
        while isinstance(found := await self._in_thread(claim), Busy):
            if time.monotonic() + found.retry_after_s > deadline:
                raise Unavailable("another process has not finished the KV that this needs", remedy="try again")
            await asyncio.sleep(found.retry_after_s)
        assert isinstance(found, ComputedChunk)
        if found.read is not None:  # somebody has handed it to the publisher meanwhile
            return await self._publish(asked, chunk, deadline)
        if found.unpublished is not None:
            asked.progress.refused(index, why_not(found.unpublished))
        elif isinstance(found.claim, StoreClaim):
            return await self._hand_on(asked, index, found.claim)
        else:
            asked.progress.stored(index)
        return True

    async def _hand_on(self, asked: _Asked, index: int, claim: StoreClaim) -> bool:
        """Gives a resident chunk to the publisher, in the device thread."""
        key = asked.job.chunks[index].key

        def publish() -> bool:
            chunk = self.worker.residents.find(key)
            if chunk is None or not chunk.ready:
                claim.drop()
                return False
            claim.publish(chunk)
            return True

        if not await self._in_device_thread(publish):
            return False
        asked.progress.handed_on(index, claim.going())
        return True

    def publishing_of(self, chunk_id: ChunkId, tenant: Tenant) -> Sequence[Publishing]:
        return self.publisher.pending_of(chunk_id, tenant)

    async def evict(self, keys: Sequence[ChunkKey], tenant: Tenant) -> None:
        residents = self.worker.residents
        await self._in_device_thread(lambda: [residents.evict(key) for key in keys])

    async def stop(self) -> None:
        """Writes out what is computed. The device thread goes on until the decode service stops."""
        await asyncio.to_thread(self.publisher.stop, self._drain_s)
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        context = contextvars.copy_context()
        return await asyncio.wrap_future(self._threads.submit(context.run, call))

    async def _in_device_thread(self, call: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def tell(result: T | None, error: BaseException | None) -> None:
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]  # of what has not failed

        def run() -> None:
            result, failed = None, None
            try:
                result = call()
            except Exception as error:
                failed = error
            loop.call_soon_threadsafe(tell, result, failed)

        self.worker.call(run)
        return await done


class _Asked:
    """One request for the chunks that a job lacks, and for those that they attend to."""

    def __init__(self, job: PrefillJob, progress: JobProgress, missing: Iterable[int], publisher: Publisher) -> None:
        self.job = job
        self.progress = progress
        self.missing = set(missing)
        self.resident: list[RequestChunk] = []  # that were in the pool, and not in the store
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wanted = self.missing | {above for index in self.missing for above in job.chunks[index].context}
        self._indices = sorted(wanted)  # in the job, by the place in the request
        self.composition = self._compose()

    def index_of(self, chunk: RequestChunk) -> int:
        """A chunk's index in the job."""
        return self._indices[chunk.index]

    def _compose(self) -> Composition:
        places = {index: place for place, index in enumerate(self._indices)}
        chunks = []
        for index, place in places.items():
            keyed, owner = self.job.chunks[index], self.job.owner(index)
            segment = Segment(
                self.job.chunk_ids[index],
                ChunkType.CONTEXT,
                keyed.token_ids,
                named_by_id=True,
                shared=owner == SHARED_TENANT,
            )
            context = tuple(places[above] for above in keyed.context)
            chunks.append(RequestChunk(place, segment, keyed.key, context, 0, owner, len(keyed.token_ids)))
        return Composition(tuple(chunks), None, ReuseMode.EXACT, (), self.job.tenant)

    def request(self) -> Request:
        """As the worker takes it, under the caller's id; its events come in the event loop.

        The owner is its own: no caller ends it by an id but the one that asked here.
        """
        owner = Tenant(f"prefill {uuid.uuid4().hex}")
        return Request(current_request_id(), self.composition, NO_ANSWER, "", False, self._events, owner)

    def _events(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, ChunkReady):
                self._ready(event.chunk)
            elif not self.ended.done():
                if isinstance(event, Failed):
                    self.ended.set_exception(event.error)
                else:
                    assert isinstance(event, AllReady) or self.progress.cancelled.is_set()
                    self.ended.set_result(None)

    def _ready(self, chunk: RequestChunk) -> None:
        """A chunk can be read: it was here, or came from the store, or was computed here or elsewhere."""
        index, outcome, progress = self.index_of(chunk), chunk.outcome, self.progress
        assert outcome is not None
        here = (KVSource.DEVICE, KVSource.HOST)  # what is in host memory may be on its way into the store only
        if outcome.source is KVSource.DEVICE or (outcome.source in here and index in self.missing):
            progress.note(index, KVSource.DEVICE)
            if index in self.missing:
                self.resident.append(chunk)
        elif outcome.unpublished is not None:
            progress.note(index, KVSource.COMPUTED)
            progress.refused(index, why_not(outcome.unpublished))
        elif isinstance(outcome.claim, StoreClaim):
            progress.note(index, KVSource.COMPUTED)
            progress.handed_on(index, outcome.claim.going())
        else:
            progress.note(index, KVSource.STORE)
            progress.stored(index)


def why_not(unpublished: Unpublished) -> Exception:
    """Why the store does not have a chunk, as it would say itself."""
    if unpublished is Unpublished.STORE_FULL:
        return StoreFull("the store has no room for the KV", "delete chunks, or raise its capacity or the quota")
    return StoreUnavailable("the store does not take the KV now", "try again")
