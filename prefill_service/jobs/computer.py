"""Makes the KV of one job exist in the store: found there, published from the pool, or computed.

For each chunk that the job needs, in the composition's order:

    stored? ── yes ── needed as context of a missing one? ── load into the pool (bad: as if it were missing)
       └─ no ── claim ── resident? else compute ── write, commit          Busy: another worker computes it

An attempt holds nothing when it ends, so one that meets a busy key simply ends, and is made again later: what
it has done is stored or resident by then. Belongs to the thread that launches device work; knows no RPC.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from chunk_store.entry import EntryHeader, MissReason
from chunk_store.errors import ClaimLost
from chunk_store.store import Busy, ChunkStore, Publication, Stored
from chunk_store.tenant import NO_LIMITS
from engine.kv.pool_bytes import incoming, outgoing
from engine.kv.resident import ResidentChunk, ResidentChunks
from engine.kv.source import KVSource
from engine.plan import PlacedChunk
from engine.run.pieces import prefill_chunk
from engine.run.protocol import Runner
from engine.served import ServedModel
from prefill_service.jobs.resolver import PrefillJob
from serving.handover.lender import Lender
from serving.handover.lent import Lent
from serving.store.heartbeat import TTL_S, heartbeat
from serving.trace.stages import StageTimer

CLAIM_LOST_RETRY_S = 0.05

log = logging.getLogger(__name__)


class JobCancelled(Exception):
    """Nobody waits for the job any more."""


@dataclass(frozen=True)
class ChunkMade:
    """A chunk that a job was asked for can be used. ``durable``: the store has it now; ``lent``: the borrower may copy
    it from the pool."""

    index: int
    source: KVSource
    durable: bool = True
    lent: Lent | None = None


@dataclass
class JobProgress:
    """What has become of a job over all its attempts. ``cancelled`` ends it between two chunks.

    ``tell`` is called once for each chunk of the job that can be used, in any thread.
    """

    timer: StageTimer
    tell: Callable[[ChunkMade], None] = lambda _: None
    sources: dict[int, KVSource] = field(default_factory=dict)  # by index in the composition
    misses: dict[int, MissReason] = field(default_factory=dict)  # the first one of each chunk
    cancelled: threading.Event = field(default_factory=threading.Event)
    told: set[int] = field(default_factory=set)

    def note(self, index: int, source: KVSource) -> None:
        """A chunk is there. What this job computed stays computed, however often it is met again."""
        if self.sources.get(index) is not KVSource.COMPUTED:
            self.sources[index] = source

    def made(self, index: int, lent: Lent | None = None) -> None:
        """A chunk's KV is stored, however it came to be."""
        if index not in self.told:
            self.told.add(index)
            self.tell(ChunkMade(index, self.sources[index], lent=lent))

    def tokens(self, job: PrefillJob) -> Counter[KVSource]:
        """Tokens by source so far."""
        counted: Counter[KVSource] = Counter()
        for index, source in self.sources.items():
            counted[source] += len(job.chunks[index].token_ids)
        return counted


class ChunkComputer:
    """One device's pool, its resident chunks and the store that they go to. ``lender`` hands them over on this host."""

    def __init__(
        self,
        served: ServedModel,
        runner: Runner,
        residents: ResidentChunks,
        store: ChunkStore,
        lender: Lender | None = None,
    ) -> None:
        self.served = served
        self.runner = runner
        self.residents = residents
        self.store = store
        self.lender = lender

    def find_missing(self, job: PrefillJob, progress: JobProgress) -> list[int]:
        """Which needed chunks are not stored, with the reasons noted. Needs no device: any thread may ask."""
        with progress.timer.stage("lookup"):
            found = self.store.lookup([job.chunks[index].key for index in job.needed])
            missing = [index for index, info in zip(job.needed, found, strict=True) if info is None]
            for index in missing:
                if index not in progress.misses:
                    progress.misses[index] = self.store.miss_reason(
                        job.chunks[index].key, job.chunk_ids[index], self.served.identity, job.owner(index)
                    )
        for index in set(job.needed) - set(missing):
            progress.sources.setdefault(index, KVSource.STORE)
            progress.made(index)
        return missing

    def attempt(self, job: PrefillJob, progress: JobProgress) -> float | None:
        """Goes through the job once. None when all is stored, else seconds to wait before the next attempt.

        Raises ``JobCancelled``, ``PoolFull`` and what stores raise.
        """
        keys = [job.chunks[index].key for index in job.needed]
        attempt = _Attempt(self, job, progress)
        with self.store.lease(keys, ttl_s=TTL_S) as lease, heartbeat(lease.renew):
            try:
                return attempt.run(self.find_missing(job, progress))
            except ClaimLost:
                return CLAIM_LOST_RETRY_S  # what was computed is still resident
            finally:
                attempt.release()


class _Attempt:
    """One walk through a job: which chunks it holds in the pool meanwhile."""

    def __init__(self, computer: ChunkComputer, job: PrefillJob, progress: JobProgress) -> None:
        self.computer = computer
        self.residents = computer.residents
        self.store = computer.store
        self.job = job
        self.progress = progress
        self.held: dict[int, ResidentChunk] = {}
        self.as_context: set[int] = set()  # what a missing chunk attends to: it must be resident

    def run(self, missing: Sequence[int]) -> float | None:
        self.as_context = {index for chunk in missing for index in self.job.chunks[chunk].context}
        for index in self.job.needed:
            if self.progress.cancelled.is_set():
                raise JobCancelled
            if index in missing or (index in self.as_context and not self._bring(index)):
                wait_s = self._publish(index)
                if wait_s is not None:
                    return wait_s
                self.progress.made(index, self._lend(index))
        return None

    def _lend(self, index: int) -> Lent | None:
        """Lends a chunk that is here to who asked for it."""
        lender, chunk = self.computer.lender, self.held.get(index)
        wanted = self.job.borrower and index in self.job.wanted and index not in self.progress.told
        return lender.lend(self.job.borrower, chunk) if lender and chunk and wanted else None

    def release(self) -> None:
        """Gives back every hold."""
        for chunk in self.held.values():
            self.residents.release(chunk)
        self.held.clear()

    def _bring(self, index: int) -> bool:
        """Makes a stored chunk resident; False, with the reason noted, if what is stored is not usable."""
        keyed = self.job.chunks[index]
        if self._hold(index):
            self.progress.note(index, KVSource.DEVICE)
            return True
        chunk = self.residents.reserve(keyed.key, len(keyed.token_ids))
        self.held[index] = chunk
        filling = incoming(self.residents.pool, chunk.run, chunk.tokens)
        with self.progress.timer.stage("load"), filling as buffers:
            reason = self.store.load(keyed.key, keyed.token_ids, buffers)
        if reason is not None:
            self.progress.misses[index] = reason
            self.residents.release(self.held.pop(index))
            return False
        chunk.ready = True
        self.progress.note(index, KVSource.STORE)
        return True

    def _publish(self, index: int) -> float | None:
        """Makes a chunk stored and resident; seconds to wait if another worker is about to store it."""
        answer = self.store.begin(self.job.chunks[index].key, ttl_s=TTL_S)
        if isinstance(answer, Busy):
            return answer.retry_after_s
        if isinstance(answer, Stored):
            self._adopt(index)
            return None
        with answer as publication, heartbeat(publication.renew):
            if self._hold(index):
                self.progress.note(index, KVSource.DEVICE)
            else:
                self._compute(index)
            with self.progress.timer.stage("publish"):
                self._write(index, publication)
        return None

    def _adopt(self, index: int) -> None:
        """Another worker stored it since the lookup; or it is stored and unreadable now: then this job uses its own."""
        if index not in self.as_context:
            self.progress.note(index, KVSource.STORE)
        elif not self._bring(index):
            self._compute(index)

    def _write(self, index: int, publication: Publication) -> None:
        keyed, chunk = self.job.chunks[index], self.held[index]
        header = EntryHeader(
            key=keyed.key,
            chunk_id=self.job.chunk_ids[index],
            model=self.computer.served.identity,
            layout=self.computer.served.layout,
            token_ids=keyed.token_ids,
            context=tuple(self.job.chunks[i].key for i in keyed.context),
            salt_digest=self.job.owner(index),
        )
        limits = self.job.limits if header.tenant == self.job.tenant else NO_LIMITS
        publication.write(header, outgoing(self.residents.pool, chunk.run, chunk.tokens), limits=limits)
        publication.commit()

    def _hold(self, index: int) -> bool:
        """Holds a chunk that is resident; False if it is not."""
        if index in self.held:
            return True
        chunk = self.residents.acquire(self.job.chunks[index].key)
        if chunk is None:
            return False
        self.held[index] = chunk
        return True

    def _compute(self, index: int) -> None:
        """The one fixed computation: this chunk alone, behind its context, which the walk has made resident."""
        keyed = self.job.chunks[index]
        chunk = self.residents.reserve(keyed.key, len(keyed.token_ids))
        self.held[index] = chunk
        page_size = self.residents.pool.page_size
        behind = [self.held[i] for i in keyed.context]  # places as they are after making room
        context = [PlacedChunk(c.first_slot(page_size), c.tokens, 0) for c in behind]
        log.debug("computing %d tokens behind %d chunks", len(keyed.token_ids), len(context))
        with self.progress.timer.stage("prefill"):
            prefill_chunk(self.computer.runner, keyed.token_ids, context, chunk.run)
        chunk.ready = True
        self.progress.note(index, KVSource.COMPUTED)
