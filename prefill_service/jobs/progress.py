"""What has become of a job so far: which chunks are there, from where, and which are on their way into the store."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from chunk_store.entry import MissReason
from chunk_store.errors import ClaimLost, StoreError
from engine.kv.source import KVSource
from prefill_service.jobs.resolver import PrefillJob
from serving.handover.lent import Lent
from serving.publishing.item import Publishing
from serving.trace.stages import StageTimer


class JobCancelled(Exception):
    """Nobody waits for the job any more."""


@dataclass(frozen=True)
class ChunkMade:
    """A chunk that a job was asked for can be used. ``durable``: the store has it now.

    ``unpublished`` is why the store does not take it, where somebody waited for that. ``lent``: the borrower may copy
    it from the pool.
    """

    index: int
    source: KVSource
    durable: bool = True
    unpublished: Exception | None = None
    lent: Lent | None = None


@dataclass
class JobProgress:
    """What has become of a job over all its attempts. ``cancelled`` ends it between two chunks.

    ``tell`` is called once for each chunk of the job that can be used, in any thread: when it is stored where the job
    is ``durable``, else as soon as it is computed. ``publishing`` is what was handed to the publisher, or found there.
    """

    timer: StageTimer
    tell: Callable[[ChunkMade], None] = lambda _: None
    durable: bool = False
    sources: dict[int, KVSource] = field(default_factory=dict)  # by index in the composition
    misses: dict[int, MissReason] = field(default_factory=dict)  # the first one of each chunk
    publishing: dict[int, Publishing] = field(default_factory=dict)
    brought: set[int] = field(default_factory=set)  # stored chunks that were read into the pool for it
    unreadable: set[int] = field(default_factory=set)  # stored chunks that could not be
    unpublished: dict[int, Exception] = field(default_factory=dict)
    lent: dict[int, Lent] = field(default_factory=dict)
    refusal: StoreError | None = None  # why the store did not take a chunk of it
    cancelled: threading.Event = field(default_factory=threading.Event)
    _told: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)  # of what was told

    def note(self, index: int, source: KVSource) -> None:
        """A chunk is there. What this job computed stays computed, however often it is met again."""
        if self.sources.get(index) is not KVSource.COMPUTED:
            self.sources[index] = source

    def read(self, index: int, reason: MissReason | None) -> None:
        """A stored chunk was read into the pool, or could not be, and why."""
        if reason is None:
            self.brought.add(index)
        else:
            self.misses[index] = reason
            self.unreadable.add(index)

    def stored(self, index: int) -> None:
        """A chunk's KV is stored, however it came to be."""
        self.publishing.pop(index, None)
        self._tell(ChunkMade(index, self.sources[index], lent=self.lent.get(index)))

    def handed_on(self, index: int, publishing: Publishing) -> None:
        """A chunk's rows are launched, and its KV is on its way into the store. In the device thread."""
        self.publishing[index] = publishing
        made = ChunkMade(index, self.sources[index], lent=self.lent.get(index))
        awaited: Future[Any] = publishing if self.durable else publishing.computed

        def ended(_: Future[Any]) -> None:
            error = publishing.exception()
            if isinstance(error, StoreError) and not isinstance(error, ClaimLost):
                self.refusal = error

        def ready(_: Future[Any]) -> None:
            if awaited.exception() is None:
                durable = publishing.done() and publishing.exception() is None
                self._tell(replace(made, durable=durable))

        publishing.add_done_callback(ended)
        awaited.add_done_callback(ready)

    def refused(self, index: int, reason: Exception) -> None:
        """The store does not take a chunk, whether it was computed or not."""
        self.unpublished[index] = reason
        source, lent = self.sources.get(index, KVSource.COMPUTED), self.lent.get(index)
        self._tell(ChunkMade(index, source, durable=False, unpublished=reason, lent=lent))

    def _tell(self, made: ChunkMade) -> None:
        with self._lock:
            if made.index in self._told:
                return
            self._told.add(made.index)
        self.tell(made)

    @property
    def came(self) -> int:
        """Grows with each chunk that is there, or is told of; it has an end."""
        return len(self.sources) + len(self._told)

    @property
    def all_stored(self) -> bool:
        """Whether the store has all that was needed."""
        return all(each.done() and each.exception() is None for each in self.publishing.values())

    def tokens(self, job: PrefillJob) -> Counter[KVSource]:
        """Tokens by source so far."""
        counted: Counter[KVSource] = Counter()
        for index, source in self.sources.items():
            counted[source] += len(job.chunks[index].token_ids)
        return counted
