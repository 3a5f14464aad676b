"""What is being written: each stage of an entry's way from the pool's pages into the store has threads of its own.

    device thread     rows launched -> begin: the pages are held still
    waiting thread    until the device is done with them          (a device of its own only)
    copying thread    own stream -> pinned memory; the pages may move again
    writing threads   hash and write, each an entry; commit, and the claim ends

On the CPU the writing threads read the pages themselves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from chunk_store.entry import EntryInfo
from chunk_store.errors import StoreError
from chunk_store.store import Publication
from engine.device import current
from engine.kv.pool_bytes import as_bytes
from engine.kv.resident import ResidentChunks
from serving.errors import Overloaded, Unavailable
from serving.publishing.held import end_quietly
from serving.publishing.item import Item
from serving.publishing.metrics import PublicationMetrics
from serving.publishing.room import give_up
from serving.publishing.staging import Staging

STAGING_S_MAX = 600.0  # for a region of the staging memory; writes end sooner, or fail

log = logging.getLogger(__name__)


class Stages:
    """Takes items to their end, whatever goes wrong: then all that they hold is given back, and they are told how.

    ``threads`` entries are written beside each other, and read where they are without ``staging``. ``post`` runs a
    function in the device thread. ``ended`` is told of an item before those who wait for it are.
    """

    def __init__(
        self,
        residents: ResidentChunks,
        *,
        post: Callable[[Callable[[], None]], object],
        threads: int,
        metrics: PublicationMetrics,
        staging: Staging | None,
        ended: Callable[[Item], None],
    ) -> None:
        self._residents = residents
        self._post = post
        self._metrics = metrics
        self._staging = staging
        self._ended = ended
        self._waiting = ThreadPoolExecutor(1, thread_name_prefix="publish-wait")
        self._copying = ThreadPoolExecutor(1, thread_name_prefix="publish-copy")
        self._writing = ThreadPoolExecutor(threads, thread_name_prefix="publish-write")
        self._given_up = False
        self._lock = threading.Lock()  # of whether an item has ended
        self._prepared = None if staging is None else self._copying.submit(staging.prepare)

    def prepared(self) -> None:
        """Returns when the staging memory is made."""
        if self._prepared is not None:
            self._prepared.result()

    # -- in the device thread -----------------------------------------------------------------------
    def launched(self, item: Item) -> None:
        """The rows of an item that waits for room were launched: tells it when they have run."""
        item.launched = self._event()
        if item.launched is None:
            self._computed(item)
        else:
            self._next(self._waiting, self._computed, item)

    def begin(self, item: Item) -> None:
        """There is room for an item, whose chunk is resident."""
        chunk = item.chunk
        with self._lock:
            if item.ended:
                return
            self._residents.hold_still(chunk)
            item.still = True
        item.planes = self._residents.pool.run_planes(chunk.run, chunk.tokens)
        item.launched = self._event()
        if self._staging is None:
            self._computed(item)
            item.buffers = as_bytes(item.planes)
            self._next(self._writing, self._write, item)
        else:
            self._next(self._waiting, self._wait, item)

    def _event(self) -> torch.cuda.Event | None:
        """Ends when all that was launched by now has run."""
        device = self._residents.pool.device
        if device.type != "cuda":
            return None
        with current(device):
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
        return event

    # -- in any thread ------------------------------------------------------------------------------
    def fail(self, item: Item, error: Exception) -> None:
        """Ends an item that is not being written, in a thread: the store may take its time to let its claim go."""
        self._next(self._waiting, partial(self._end, outcome=error), item)

    def give_up(self) -> None:
        """Whatever comes to its next stage fails there."""
        self._given_up = True

    def stop(self, *, wait: bool) -> None:
        """Takes nothing more."""
        for threads in (self._waiting, self._copying, self._writing):
            threads.shutdown(wait=wait, cancel_futures=False)

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
        self._ended(item)
        give_up(item.asked)
        if not item.future.computed.done():
            item.future.computed.set_exception(outcome if isinstance(outcome, BaseException) else None)
        if isinstance(outcome, EntryInfo):
            self._metrics.published(item.header.nbytes, time.monotonic() - item.began)
            item.future.set_result(outcome)
        else:
            self._metrics.failed(outcome)
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
            self._post(lambda: self._residents.let_move(item.chunk))
        except RuntimeError as error:  # the device thread has ended, and nobody asks for pages any more
            log.debug("the pages of %s stay held: %s", item.header.key, error)


def stopped() -> Unavailable:
    return Unavailable("the service is shutting down")
