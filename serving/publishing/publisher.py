"""Write-behind: chunks go from the pool's pages into the store while the device computes the next ones.

    device thread     rows launched -> submit: the pages are held still
    waiting thread    until the device is done with them          (a device of its own only)
    copying thread    own stream -> pinned memory; the pages may move again
    writing threads   hash and write, each an entry; commit, and the claim ends

On the CPU the writing threads read the pages themselves. Room in the queue is taken before a chunk is computed, so that
who computes faster than the store takes it waits (``reserve``); or the chunk waits for room where it is, in the pool
(``ask_behind``), as many bytes as the queue has. A publication that fails loses nothing but durability: the chunk stays
resident, its claim ends, and whoever needs it in the store computes or publishes it again. Claims of what waits are
kept (``held.py``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout

import torch

from chunk_store.entry import EntryHeader, EntryInfo
from chunk_store.errors import StoreError
from chunk_store.key import ChunkId, ChunkKey
from chunk_store.landing import Landing
from chunk_store.store import ChunkStore, Publication
from chunk_store.tenant import NO_LIMITS, Tenant, TenantLimits
from engine.device import current
from engine.kv.pool_bytes import as_bytes
from engine.kv.resident import ResidentChunk, ResidentChunks
from serving.errors import Cancelled, Overloaded, Unavailable
from serving.publishing.held import HeldClaim, HeldClaims, end_quietly
from serving.publishing.item import Item, Publishing
from serving.publishing.metrics import PublicationMetrics
from serving.publishing.room import Place, Room, give_up, given
from serving.publishing.staging import Staging

STAGING_S_MAX = 600.0  # for a region of the staging memory; writes end sooner, or fail
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
        pool = residents.pool
        self._staging = Staging(nbytes_max, pool.device) if staging is None and pool.device.type != "cpu" else staging
        self._waiting = ThreadPoolExecutor(1, thread_name_prefix="publish-wait")
        self._copying = ThreadPoolExecutor(1, thread_name_prefix="publish-copy")
        self._writing = ThreadPoolExecutor(threads, thread_name_prefix="publish-write")
        self._items: dict[ChunkKey, Item] = {}
        self._lock = threading.Lock()
        self._stopped = self._given_up = False
        self.claims = HeldClaims(store)
        residents.on_evict.append(self._has_left)
        metrics.watch(lambda: self.room.taken + self.room.waiting)
        if self._staging is not None:
            self._copying.submit(self._staging.prepare)

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
            self._begin(item)
        else:
            item.launched = self._launched()
            if item.launched is None:
                self._computed(item)
            else:
                self._next(self._waiting, self._computed, item)
            item.asked.add_done_callback(lambda _: self._room_came(item))
        return item.future

    def _launched(self) -> torch.cuda.Event | None:
        """Ends when all that was launched by now has run."""
        device = self.residents.pool.device
        if device.type != "cuda":
            return None
        with current(device):
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
        return event

    def _begin(self, item: Item) -> None:
        """There is room, and the chunk is resident."""
        chunk = item.chunk
        with self._lock:
            if item.ended:
                return
            self.residents.hold_still(chunk)
            item.still = True
        item.planes = self.residents.pool.run_planes(chunk.run, chunk.tokens)
        item.launched = self._launched()
        if self._staging is None:
            self._computed(item)
            item.buffers = as_bytes(item.planes)
            self._next(self._writing, self._write, item)
        else:
            self._next(self._waiting, self._wait, item)

    # -- what waits for room in the pool ------------------------------------------------------------
    def _room_came(self, item: Item) -> None:
        """In any thread; there may be none, when it is stopped."""

        def begin() -> None:
            if self._is_here(item):
                self._begin(item)
            else:
                self._next(self._waiting, self._gone, item)

        if item.asked.cancelled() or item.asked.exception() is not None:
            self._next(self._waiting, self._gone, item)
            return
        try:
            self._post(begin)
        except RuntimeError:  # the device thread has ended
            self._next(self._waiting, self._gone, item)

    def _is_here(self, item: Item) -> bool:
        """Device thread only."""
        return self.residents.find(item.header.key) is item.chunk

    def _has_left(self, key: ChunkKey) -> None:
        """A chunk has left the pool: if it waited for room, it ends, and others may claim it. Device thread only."""
        item = self._item(key)
        if item is not None and not item.asked.done():
            give_up(item.asked)

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
            self._given_up = True
            for each in asked:
                each.cancel()
            self.flush(STOP_S)
        for threads in (self._waiting, self._copying, self._writing):
            threads.shutdown(wait=done, cancel_futures=False)
        self.claims.stop()
        return done

    # -- stages, each in a thread of its own --------------------------------------------------------
    def _next(self, threads: ThreadPoolExecutor, stage: Callable[[Item], None], item: Item) -> None:
        """Hands an item on; whatever goes wrong with it, it ends."""

        def run() -> None:
            try:
                if self._given_up:
                    raise stopped()
                stage(item)
            except BaseException as error:
                self._end(item, error)

        try:
            threads.submit(item.context.copy().run, run)  # a copy: this stage may still run in it
        except RuntimeError:  # shut down
            self._end(item, stopped())

    def _computed(self, item: Item) -> None:
        if item.launched is not None:
            item.launched.synchronize()
        if not item.future.computed.done():
            item.future.computed.set_result(None)

    def _gone(self, item: Item) -> None:
        raise stopped() if self._stopped else queue_full(self.room)

    def _wait(self, item: Item) -> None:
        self._computed(item)
        self._next(self._copying, self._copy, item)

    def _copy(self, item: Item) -> None:
        assert self._staging is not None
        item.region = self._staging.take(item.header.nbytes, time.monotonic() + STAGING_S_MAX)
        item.buffers = self._staging.copy(item.planes, item.region)
        self._let_move(item)
        self._next(self._writing, self._write, item)

    def _write(self, item: Item) -> None:
        def write(publication: Publication) -> EntryInfo:
            publication.write(item.header, item.buffers, limits=item.limits)
            return publication.commit()

        self._end(item, item.claim.write(write))

    def _end(self, item: Item, outcome: EntryInfo | BaseException) -> None:
        """Gives back all that the item holds, then tells those who wait for it."""
        with self._lock:
            if item.ended:
                return
            item.ended = True
        if not isinstance(outcome, EntryInfo):
            self._abort(item, outcome)
        with item.reading:
            item.buffers = item.planes = ()
        if item.region is not None and self._staging is not None:
            self._staging.give_back(item.region)
        self._let_move(item)
        with self._lock:
            if self._items.get(item.header.key) is item:
                del self._items[item.header.key]
        give_up(item.asked)
        if not item.future.computed.done():
            item.future.computed.set_exception(outcome if isinstance(outcome, BaseException) else None)
        if isinstance(outcome, EntryInfo):
            self.metrics.published(item.header.nbytes, time.monotonic() - item.began)
            item.future.set_result(outcome)
        else:
            self.metrics.failed(outcome)
            item.future.set_exception(outcome)

    def _abort(self, item: Item, error: BaseException) -> None:
        expected = isinstance(error, StoreError | Unavailable | Overloaded)
        level = logging.INFO if isinstance(error, Overloaded) else logging.WARNING  # there may be many of those
        log.log(level, "chunk %s is not stored: %s", item.header.chunk_id, error, exc_info=None if expected else error)
        end_quietly(item.claim)  # harmless where the write has done so

    def _let_move(self, item: Item) -> None:
        if not item.still:
            return
        item.still = False
        try:
            self._post(lambda: self.residents.let_move(item.chunk))
        except RuntimeError as error:  # the device thread has ended, and nobody asks for pages any more
            log.debug("the pages of %s stay held: %s", item.header.key, error)


def queue_full(room: Room) -> Overloaded:
    """For who has waited for room as long as it may."""
    return Overloaded(
        f"{room.taken} bytes of computed KV wait to be written to the store (at most {room.nbytes_max})",
        remedy="try again; if it stays so, the store is too slow for what is computed",
        retry_after_s=1.0,
    )


def stopped() -> Unavailable:
    return Unavailable("the service is shutting down")
