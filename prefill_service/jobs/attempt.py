"""One attempt at a job, in the thread that launches device work. For each chunk that the job needs, in order:

    stored? ── yes ── seen, as context, by a missing one? ── have it read into the pool (bad: as if it were missing)
       └─ no ── on its way into the store from here? ── yes ── use it where it is
                   └─ no ── room in the queue? ── claim ── resident? else compute ── hand to the publisher

What another worker computes holds up only what attends to it. An attempt holds nothing when it ends, so one that would
have to wait (for another worker, the queue, the pool, another tenant's turn) simply ends, and is made again later: what
it has done is stored, or resident and pending, by then.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chunk_store.entry import EntryHeader
from chunk_store.store import Busy, Publication, Stored
from chunk_store.tenant import NO_LIMITS
from engine.kv.resident import ResidentChunk
from engine.kv.source import KVSource
from engine.plan import PlacedChunk
from engine.run.pieces import prefill_chunk
from prefill_service.jobs.progress import JobCancelled, JobProgress
from prefill_service.jobs.resolver import PrefillJob, seen_context
from serving.publishing.held import end_quietly
from serving.publishing.item import Publishing
from serving.publishing.room import Place
from serving.store.heartbeat import TTL_S

if TYPE_CHECKING:
    from prefill_service.jobs.own_pool import OwnPool

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BusyFor:
    """Another worker is about to store a chunk: try again after ``seconds``."""

    seconds: float


@dataclass(frozen=True)
class RoomFor:
    """The queue has no room for a chunk of ``nbytes`` now."""

    nbytes: int


@dataclass(frozen=True)
class EndOf:
    """A chunk of here has left the pool and is not stored yet."""

    publishing: Publishing


@dataclass(frozen=True)
class LoadOf:
    """Chunks that missing ones attend to have to be read into the pool, by their indices: stored ones, or such as wait
    in memory to be."""

    indices: tuple[int, ...]


Wait = BusyFor | RoomFor | EndOf | LoadOf
OTHERS_TURN = BusyFor(0.0)  # another tenant's step goes first


class Attempt:
    """One walk through a job: which chunks it holds in the pool meanwhile.

    ``places`` is room in the queue that was waited for; what it does not use stays in there.
    """

    def __init__(self, pool: OwnPool, job: PrefillJob, progress: JobProgress, places: list[Place]) -> None:
        self.computer = pool
        self.residents = pool.residents
        self.store = pool.store
        self.publisher = pool.publisher
        self.job = job
        self.progress = progress
        self.places = places
        self.held: dict[int, ResidentChunk] = {}
        self.as_context: dict[int, int] = {}  # what a missing chunk sees: it must be resident; by whom it is seen last
        self.worked = False  # whether it has got on: only then others go first

    def run(self, missing: Collection[int]) -> Wait | None:
        """None when nothing is left to do, else what has to be waited for, when all is done that need not wait."""
        self.as_context = {index: chunk for chunk in sorted(missing) for index in self._seen(chunk)}
        if absent := self._absent(missing):
            return LoadOf(absent)
        last, busy, held_up = max(missing, default=-1), None, set[int]()
        for index in self.job.needed:
            if self.progress.cancelled.is_set():
                raise JobCancelled
            if held_up and not held_up.isdisjoint(self._seen(index)):
                held_up.add(index)
                continue
            if index not in missing and (index not in self.as_context or self._bring(index)):
                continue
            if self.progress.durable and self.progress.refusal is not None:
                self.progress.refused(index, self.progress.refusal)  # it is not computed for nobody
                continue
            wait = self._provide(index)
            if isinstance(wait, BusyFor):
                busy = wait
                held_up.add(index)
            elif wait is not None:
                return wait
            elif self.worked and index < last and self.computer.device.others_wait(self.job.tenant):
                return OTHERS_TURN
        return busy

    def release(self) -> None:
        """Gives back every hold."""
        for chunk in self.held.values():
            self.residents.release(chunk)
        self.held.clear()

    def _bring(self, index: int) -> bool:
        """Holds a stored chunk that is resident; False if what is stored is not usable."""
        if not self._hold(index):
            return False
        self.progress.note(index, KVSource.STORE if index in self.progress.brought else KVSource.DEVICE)
        return True

    def _absent(self, missing: Collection[int]) -> tuple[int, ...]:
        """Stored chunks that others need resident and that are not; those that are readable."""
        wanted = self.as_context.keys() - set(missing) - self.progress.unreadable
        return tuple(index for index in sorted(wanted) if not self._hold(index))

    def _provide(self, index: int) -> Wait | None:
        """Has a chunk that is not stored on its way there, resident if another needs it."""
        publishing = self.publisher.pending(self.job.chunks[index].key)
        if publishing is not None:
            return self._join(index, publishing)
        nbytes = self.computer.served.layout.nbytes(len(self.job.chunks[index].token_ids))
        place = self._place(nbytes)
        if place is None:
            return RoomFor(nbytes)
        try:
            answer = self.store.begin(self.job.chunks[index].key, ttl_s=TTL_S)
            if isinstance(answer, Busy):
                return BusyFor(answer.retry_after_s)
            if isinstance(answer, Stored):
                return self._adopt(index)
            self._publish(index, answer, place)
            place = None
        finally:
            if place is not None:
                place.give_back()
        return None

    def _place(self, nbytes: int) -> Place | None:
        """Room for a chunk: what was waited for, if it was for this one, or what is there now."""
        while self.places:
            place = self.places.pop()
            if place.nbytes == nbytes:
                return place
            place.give_back()
        return self.publisher.try_reserve(nbytes)

    def _join(self, index: int, publishing: Publishing) -> Wait | None:
        """A chunk that this process writes already, for another job or an earlier attempt."""
        if index in self.as_context and not self._hold(index):  # it made room for others
            if index not in self.progress.unreadable and self.publisher.in_memory(self.job.chunks[index].key):
                return LoadOf((index,))
            return EndOf(publishing)  # it can be loaded when it is stored
        self.progress.note(index, KVSource.DEVICE)
        if self._hold(index):
            self._lend(index)
        self._hand_on(index, publishing)
        return None

    def _adopt(self, index: int) -> Wait | None:
        """Another worker stored it since the lookup; or it is stored and unreadable now: then this job uses its own.

        It is not lent: it may be computed anew, and nobody waits for that to be over.
        """
        if index not in self.as_context:
            self.progress.note(index, KVSource.STORE)
        elif not self._bring(index):
            if index not in self.progress.unreadable:
                return LoadOf((index,))
            self._compute(index)
        self.progress.stored(index)
        return None

    def _publish(self, index: int, publication: Publication, place: Place) -> None:
        """Hands a claimed chunk over as soon as it is resident; the claim ends if that fails."""
        claim = self.publisher.claims.hold(self.job.chunks[index].key, publication)
        try:
            if self._hold(index):
                self.progress.note(index, KVSource.DEVICE)
            else:
                self._compute(index)
            header = self._header(index)
            limits = self.job.limits if header.tenant == self.job.tenant else NO_LIMITS
            publishing = self.publisher.submit(place, header, self.held[index], claim, limits)
        except BaseException:
            end_quietly(claim)
            raise
        self.worked = True
        self._lend(index)
        self._hand_on(index, publishing)

    def _hand_on(self, index: int, publishing: Publishing) -> None:
        """A chunk's way into the store is the publisher's, which holds it as long as it must."""
        self.progress.handed_on(index, publishing)
        for done in [each for each in self.held if each <= index and self.as_context.get(each, index) <= index]:
            self.residents.release(self.held.pop(done))

    def _lend(self, index: int) -> None:
        """Lends a chunk that is here to who asked for it, once."""
        lender, chunk = self.computer.lender, self.held.get(index)
        wanted = self.job.borrower and index in self.job.wanted and index not in self.progress.lent
        if lender is not None and chunk is not None and wanted:
            self.progress.lent[index] = lender.lend(self.job.borrower, chunk)

    def _header(self, index: int) -> EntryHeader:
        keyed = self.job.chunks[index]
        return EntryHeader(
            key=keyed.key,
            chunk_id=self.job.chunk_ids[index],
            model=self.computer.served.identity,
            layout=self.computer.served.layout,
            token_ids=keyed.token_ids,
            context=tuple(self.job.chunks[i].key for i in keyed.context),
            salt_digest=self.job.owner(index),
        )

    def _seen(self, index: int) -> tuple[int, ...]:
        """The context that a chunk's rows see: what is out of their sight need not be resident."""
        return seen_context(self.job.chunks, index, self.computer.served.sight)

    def _hold(self, index: int) -> bool:
        """Holds a chunk that is resident; False if it is not."""
        if index in self.held:
            return True
        chunk = self.residents.find(self.job.chunks[index].key)
        if chunk is None or not chunk.ready:  # or being read, for another job
            return False
        self.held[index] = chunk
        self.residents.acquire(chunk.key)
        return True

    def _compute(self, index: int) -> None:
        """The one fixed computation: this chunk alone, behind its context, which the walk has made resident."""
        keyed = self.job.chunks[index]
        chunk = self.residents.reserve(keyed.key, len(keyed.token_ids))
        self.held[index] = chunk
        page_size = self.residents.pool.page_size
        context: list[PlacedChunk] = []
        start = keyed.computed_start
        for there in reversed([self.held[i] for i in self._seen(index)]):  # places as they are after making room
            start -= there.tokens
            context.insert(0, PlacedChunk(there.first_slot(page_size), there.tokens, 0, start))
        log.debug("computing %d tokens behind %d chunks", len(keyed.token_ids), len(context))
        with self.progress.timer.stage("prefill"):
            prefill_chunk(self.computer.runner, keyed.token_ids, context, chunk.run, keyed.computed_start)
        chunk.ready = True
        self.progress.note(index, KVSource.COMPUTED)
