"""One fetch: what is known of each wanted chunk, and what has come of it."""

from __future__ import annotations

import contextvars
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from chunk_store.entry import MissReason
from chunk_store.errors import StoreError, StoreFull, StoreUnavailable
from chunk_store.key import ChunkKey
from chunk_store.tenant import visible_to
from decode_service.kv_source.asking import ComputedChunk, FetchTerms, NoRoomToAsk, Wanted
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import ChunkOutcome, Claim, RequestChunk, Unpublished
from engine.kv.source import KVSource
from serving.errors import NotFound, Unavailable
from serving.store.heartbeat import heartbeat
from serving.trace.stages import Stage

if TYPE_CHECKING:  # it makes fetches
    from decode_service.kv_source.fetcher import KVFetcher

log = logging.getLogger(__name__)

REGISTER_ATTEMPTS_MAX = 3  # of content that others displaced before the prefill service looked for it


class Fetch:
    """Brings in what one composition lacks. What is stored is loaded, and what was computed, while more is computed."""

    def __init__(
        self, source: KVFetcher, composition: Composition, wanted: Sequence[Wanted], terms: FetchTerms
    ) -> None:
        self._source = source
        self._store = source.store
        self._composition = composition
        self._wanted = wanted
        self._terms = terms
        self._ended_ns = [time.monotonic_ns()]  # of the stages: begun, looked up, computed, loaded

    def spent_ns(self) -> dict[Stage, int]:
        """By stage; what is loaded while more is computed takes no time of its own."""
        began, looked_up, computed, loaded = (self._ended_ns + [time.monotonic_ns()] * 3)[:4]
        return {"lookup": looked_up - began, "prefill": computed - looked_up, "load": loaded - computed}

    def run(self) -> None:
        """Raises what stores raise, ``RequestError`` and ``NoRoomToAsk``; nothing is written to any memory then."""
        keys = [want.chunk.key for want in self._wanted]
        with self._leased(keys) as renew:
            found = self._store.lookup(keys)
            there: list[Wanted] = []
            absent: list[Wanted] = []
            for want, info in zip(self._wanted, found, strict=True):
                (absent if info is None and not want.memory.held else there).append(want)
            for want in absent:
                want.missed = self._why_missing(want.chunk)
            self._ended_ns.append(time.monotonic_ns())
            if absent:
                log.info("not stored: %s", ", ".join(f"chunk {want.chunk.index} ({want.missed})" for want in absent))
            unreadable = self._bring(there, absent, renew, self._borrowing())
            if unreadable:  # computed anew, or waited for until the store has it, once
                unreadable = self._bring([], unreadable, renew, self._terms)
            for want in unreadable:
                raise Unavailable(
                    f"its KV was computed but cannot be loaded ({want.missed})",
                    field=f"segments[{want.chunk.given_index}]",
                    remedy="try again",
                )

    def _borrowing(self) -> FetchTerms:
        """The terms on which chunks may come from who computed them, as soon as they are computed."""
        borrower = self._source.borrower
        if borrower is None:
            return self._terms
        return replace(self._terms, borrower=borrower.name, durable=not borrower.lenders)

    @contextmanager
    def _leased(self, keys: Sequence[ChunkKey]) -> Iterator[Callable[[], None]]:
        """Keeps what is stored from being evicted inside the block, if that can be had; gives what renews it."""
        lease = self._source.lease(keys)

        def renew() -> None:
            if lease is not None:
                with suppress(StoreUnavailable, StoreFull):
                    lease.renew()

        try:
            yield renew
        finally:
            if lease is not None:
                with suppress(StoreError):
                    lease.release()

    def go_without(self, why: Unpublished, error: StoreError) -> None:
        """The store is of no use now: what is not in host memory is left to be computed."""
        log.warning("KV is computed without the chunk store: %s", error)
        for want in self._wanted:
            if want.outcome is not None:
                continue
            if want.memory.held:
                source, reason = want.memory.fill(lambda _: MissReason.LOAD_FAILED)
                if reason is None:
                    want.outcome = ChunkOutcome(source)
                    self._terms.came(want)
                    continue
            self._leave(want, why)

    def _bring(
        self, there: Sequence[Wanted], absent: Sequence[Wanted], renew: Callable[[], None], terms: FetchTerms
    ) -> list[Wanted]:
        """Loads what is there, has the rest computed and takes each as it comes. Returns what could not be had."""
        if absent and not self._terms.may_ask():
            raise NoRoomToAsk
        threads = self._source.load_threads if len(self._wanted) > 1 else None
        with Loading(threads, self._load) as loading:
            for want in there:
                loading.begin(want)
            if absent:
                with heartbeat(renew), closing(self._computed(absent, terms)) as computed:
                    for want in computed:
                        if want.made is None or want.made.lent is None:
                            renew()  # at once: it covers what has just been computed, too, while the rest is
                        loading.begin(want)
            self._ended_ns.append(time.monotonic_ns())
            loading.wait()
        return [want for want in (*there, *absent) if want.outcome is None]

    def _computed(self, absent: Sequence[Wanted], terms: FetchTerms) -> Generator[Wanted, None, None]:
        """Yields missing chunks as they can be had; leaves those that can be neither stored nor lent.

        Asks again where content was displaced before the prefill service looked for it: a registry that is full drops
        content that only passes through when other such content comes. Where that goes on, the rest is left.
        """
        left = {want.chunk.index: want for want in absent}
        for _ in range(REGISTER_ATTEMPTS_MAX):
            try:
                self._source.register(self._composition)
            except StoreFull as error:  # what is stored can still be loaded
                log.warning("content is not registered: %s", error)
                break
            try:
                for made in self._source.ask(self._composition, sorted(left), terms):
                    want = left.pop(made.index)
                    want.made = made
                    if made.claim is not None:
                        self._leave(want, None, made.claim)
                    elif made.unpublished is not None and made.lent is None:
                        self._leave(want, made.unpublished)
                    else:
                        yield want
                break
            except NotFound:
                if self._is_gone(left):
                    raise
        for want in left.values():
            self._leave(want, Unpublished.STORE_FULL)

    def _is_gone(self, left: Mapping[int, Wanted]) -> bool:
        """Whether content is missing that nobody registers anew: the caller named it by its id."""
        chunks = self._composition.chunks[: max(left) + 1]
        if all(chunk.segment.named_by_id for chunk in chunks):
            return True
        named = [chunks[index].segment.chunk_id for index in left if chunks[index].segment.named_by_id]
        return None in self._store.get_records(named, visible_to(self._composition.tenant)) if named else False

    def _load(self, want: Wanted) -> None:
        """Takes a chunk from who computed it, or loads it, or notes why it cannot be."""
        chunk, made = want.chunk, want.made
        if made is not None:
            if self._take_over(want, made) or self._take_at_hand(want, made):
                return
            if made.unpublished is not None:
                return self._leave(want, made.unpublished)
            if not made.durable and made.read is None:
                return  # asked for again, until the store has it
        source, reason = want.memory.fill(lambda landing: self._store.land(chunk.key, chunk.token_ids, landing))
        if reason is not None:
            want.missed = want.missed or reason
            return
        want.outcome = ChunkOutcome(source if want.missed is None else KVSource.COMPUTED, want.missed)
        self._terms.came(want)

    def _take_over(self, want: Wanted, made: ComputedChunk) -> bool:
        """Copies what was lent into the chunk's memory; whether that went well."""
        borrower, memory = self._source.borrower, want.memory
        if made.lent is None or borrower is None:
            return False
        if borrower.copy(made.lent, memory.planes, after=memory.launched) is not None:
            return False
        want.outcome = ChunkOutcome(KVSource.COMPUTED, want.missed)
        self._terms.came(want)
        return True

    def _take_at_hand(self, want: Wanted, made: ComputedChunk) -> bool:
        """Copies what waits here to be written; whether it was there still. If not, the store may have it now."""
        read = made.read
        if read is None:
            return False
        _, failed = want.memory.fill(lambda landing: None if read(landing) else MissReason.LOAD_FAILED)
        if failed is None:
            want.outcome = ChunkOutcome(KVSource.HOST)
            self._terms.came(want)
        return failed is None

    def _leave(self, want: Wanted, why: Unpublished | None, claim: Claim | None = None) -> None:
        """It is to be computed by whoever asked: to be published, or the reason why not."""
        want.outcome = ChunkOutcome(KVSource.COMPUTED, want.missed or MissReason.LOAD_FAILED, why, claim)
        self._terms.came(want)

    def _why_missing(self, chunk: RequestChunk) -> MissReason:
        return self._store.miss_reason(chunk.key, chunk.segment.chunk_id, self._source.model, chunk.tenant)


class Loading:
    """Loads of one fetch, side by side: one is read while another is verified or on its way to a device.

    Without ``threads`` each is done where it is begun. Leaving it, no load writes to its memory any more.
    """

    def __init__(self, threads: Executor | None, load: Callable[[Wanted], None]) -> None:
        self._threads = threads
        self._load = load
        self._jobs: list[Future[None]] = []

    def begin(self, want: Wanted) -> None:
        if self._threads is None:
            return self._load(want)
        # Each with a context of its own, for its log lines bear the request.
        self._jobs.append(self._threads.submit(contextvars.copy_context().run, self._load, want))

    def wait(self) -> None:
        """Raises what the first one that failed did."""
        for job in self._jobs:
            job.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for job in self._jobs:
            job.cancel()
        wait(self._jobs)
