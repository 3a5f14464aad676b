"""Write-behind: chunks go from the pool's pages into the store while the device computes the next ones.

Room in the queue is taken before a chunk is computed, so that who computes faster than the store takes it waits
(``reserve``); or the chunk waits for room where it is, in the pool (``ask_behind``), as many bytes as the queue has.
``stages.py`` writes what has room. A publication that fails loses nothing but durability: the chunk stays resident, its
claim ends, and whoever needs it in the store computes or publishes it again. Claims of what waits are kept
(``held.py``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeout

from chunk_store.entry import EntryHeader
from chunk_store.key import ChunkId, ChunkKey
from chunk_store.landing import Landing
from chunk_store.store import ChunkStore
from chunk_store.tenant import NO_LIMITS, Tenant, TenantLimits
from engine.kv.resident import ResidentChunk, ResidentChunks
from serving.errors import Cancelled, Overloaded
from serving.publishing.held import HeldClaim, HeldClaims
from serving.publishing.item import Item, Publishing
from serving.publishing.metrics import PublicationMetrics
from serving.publishing.room import Place, Room, give_up, given
from serving.publishing.stages import Stages, stopped
from serving.publishing.staging import Staging

STOP_S = 5.0  # for what is being written when the time to drain is over
LOOK_S = 0.1  # between two looks whether somebody still waits

log = logging.getLogger(__name__)


class Publisher:
    """Writes resident chunks behind, at most ``nbytes_max`` bytes at a time, ``threads`` entries beside each other.

    ``post`` runs a function in the device thread, to which the residents belong. ``staging`` is the host memory that
    KV passes through; without it pages are read where they are, which only a CPU's can be.
    """

    def __init__(
        self,
        residents: ResidentChunks,
        store: ChunkStore,
        *,
        post: Callable[[Callable[[], None]], object],
        nbytes_max: int,
        threads: int,
        metrics: PublicationMetrics,
        staging: Staging | None = None,
    ) -> None:
        self.residents = residents
        self.room = Room(nbytes_max)
        self.metrics = metrics
        self._post = post
        self._items: dict[ChunkKey, Item] = {}
        self._lock = threading.Lock()
        self._stopped = False
        device = residents.pool.device
        if staging is None and device.type != "cpu":
            staging = Staging(nbytes_max, device)
        self.stages = Stages(residents, post=post, threads=threads, metrics=metrics, staging=staging, ended=self._ended)
        self.claims = HeldClaims(store)
        residents.on_evict.append(self._has_left)
        metrics.watch(lambda: self.room.taken + self.room.waiting)

    # -- room ---------------------------------------------------------------------------------------
    def ask(self, nbytes: int) -> Future[Place]:
        """Room for an entry of ``nbytes`` of KV, in the order asked. Raises ``Unavailable`` when it is stopped.

        Who no longer wants it cancels the future, and gives back what it could not cancel.
        """
        return self._timed(self.room.ask(nbytes))

    def ask_behind(self, nbytes: int) -> Future[Place] | None:
        """Room for what is computed meanwhile, without waiting for it; None where so many bytes wait for room already.

        The chunk stays in the pool until there is room, if nobody wants its pages before: then it is not stored.
        """
        asked = self.room.ask_behind(nbytes)
        return None if asked is None else self._timed(asked)

    def _timed(self, asked: Future[Place]) -> Future[Place]:
        if not asked.done():
            began = time.monotonic()
            asked.add_done_callback(lambda _: self.metrics.waited(time.monotonic() - began))
        return asked

    def try_reserve(self, nbytes: int) -> Place | None:
        """Room at once, or None. For the device thread, which must not wait."""
        return self.room.take(nbytes)

    def reserve(self, nbytes: int, deadline: float, abandoned: Callable[[], bool]) -> Place:
        """Waits for room until ``deadline`` (monotonic seconds). Any thread but the device thread.

        Raises ``Overloaded`` at the deadline, ``Cancelled`` when ``abandoned`` says so, ``Unavailable`` when stopped.
        """
        asked = self.ask(nbytes)
        while True:
            try:
                return asked.result(max(0.0, min(LOOK_S, deadline - time.monotonic())))
            except FutureTimeout:
                if time.monotonic() < deadline and not abandoned():
                    continue
            if not asked.cancel():
                return asked.result()
            if abandoned():
                raise Cancelled("nobody waits for the entry any more")
            raise queue_full(self.room)

    # -- entries ------------------------------------------------------------------------------------
    def submit(
        self,
        place: Place | Future[Place],
        header: EntryHeader,
        chunk: ResidentChunk,
        claim: HeldClaim,
        limits: TenantLimits = NO_LIMITS,
    ) -> Publishing:
        """Takes over ``place`` and ``claim``, for a chunk whose rows were all launched. Device thread only.

        Where the place is still to come, the chunk waits for it in the pool, held by nobody: if it leaves the pool
        before, it fails with ``Overloaded``. Raises ``Unavailable`` when it is stopped; then it has taken nothing over.
        """
        item = Item(header, chunk, claim, limits, place if isinstance(place, Future) else given(place))
        with self._lock:
            if self._stopped:
                raise stopped()
            self._items[header.key] = item
        if item.asked.done():
            self.stages.begin(item)
        else:
            self.stages.launched(item)
            item.asked.add_done_callback(lambda _: self._room_came(item))
        return item.future

    # -- what waits for room in the pool ------------------------------------------------------------
    def _room_came(self, item: Item) -> None:
        """In any thread; there may be none, when it is stopped."""

        def begin() -> None:
            if self.residents.find(item.header.key) is item.chunk:
                self.stages.begin(item)
            else:
                self._gone(item)

        if item.asked.cancelled() or item.asked.exception() is not None:
            self._gone(item)
            return
        try:
            self._post(begin)
        except RuntimeError:  # the device thread has ended
            self._gone(item)

    def _gone(self, item: Item) -> None:
        self.stages.fail(item, stopped() if self._stopped else queue_full(self.room))

    def _has_left(self, key: ChunkKey) -> None:
        """A chunk has left the pool: if it waited for room, it ends, and others may claim it. Device thread only."""
        item = self._item(key)
        if item is not None and not item.asked.done():
            give_up(item.asked)

    def _ended(self, item: Item) -> None:
        with self._lock:
            if self._items.get(item.header.key) is item:
                del self._items[item.header.key]

    # -- what is under way --------------------------------------------------------------------------
    def in_memory(self, key: ChunkKey) -> bool:
        """Whether a chunk's KV is in memory to be written now, wherever its pages are."""
        item = self._item(key)
        return item is not None and bool(item.buffers)

    def read(self, key: ChunkKey, landing: Landing) -> bool:
        """Copies the KV of a chunk that is being written from where it is; False if it is not in memory."""
        item = self._item(key)
        return item is not None and item.read(landing)

    def _item(self, key: ChunkKey) -> Item | None:
        with self._lock:
            return self._items.get(key)

    def pending(self, key: ChunkKey) -> Publishing | None:
        """The publication of ``key`` that is under way here."""
        item = self._item(key)
        return None if item is None else item.future

    def pending_of(self, chunk_id: ChunkId, tenant: Tenant) -> list[Publishing]:
        """The publications of a tenant's chunk, under whatever context, that are under way here."""
        with self._lock:
            items = list(self._items.values())
        return [item.future for item in items if (item.header.chunk_id, item.header.tenant) == (chunk_id, tenant)]

    def all_pending(self) -> list[Publishing]:
        """What is under way now, the oldest first."""
        with self._lock:
            return [item.future for item in self._items.values()]

    # -- the end ------------------------------------------------------------------------------------
    def flush(self, timeout_s: float) -> bool:
        """Waits until all that was submitted by now is stored or has failed; False if it took too long."""
        return not wait(self.all_pending(), timeout_s).not_done

    def stop(self, timeout_s: float) -> bool:
        """Takes no more, and writes out what it has; False if that took longer, and the rest was dropped.

        The device thread must still run. Claims of what was dropped end.
        """
        with self._lock:
            self._stopped = True
            asked = [item.asked for item in self._items.values()]
        self.room.close(stopped(), but=asked)
        done = self.flush(timeout_s)
        if not done:
            left = self.all_pending()
            log.warning("%d computed entries are not stored: no time is left to write them", len(left))
            self.stages.give_up()
            for each in asked:
                each.cancel()
            self.flush(STOP_S)
        self.stages.stop(wait=done)
        self.claims.stop()
        return done


def queue_full(room: Room) -> Overloaded:
    """For who has waited for room as long as it may."""
    return Overloaded(
        f"{room.taken} bytes of computed KV wait to be written to the store (at most {room.nbytes_max})",
        remedy="try again; if it stays so, the store is too slow for what is computed",
        retry_after_s=1.0,
    )
