"""Where the worker gets KV that is not resident: the chunk store, and the prefill service for what is missing.

Runs in loader threads. One ``fetch`` brings in all that one composition lacks; it holds leases meanwhile,
so nothing that it found is evicted before it is loaded. It does not know the pool: it fills the memory given. What
the store cannot take or give, it leaves to whoever asked to compute.
"""

from __future__ import annotations

import contextvars
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from chunk_store.entry import MissReason
from chunk_store.errors import StoreError, StoreFull, StoreUnavailable
from chunk_store.key import ChunkKey, ModelIdentity
from chunk_store.store import ChunkStore, Lease
from chunk_store.tenant import Tenant
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import ChunkOutcome, RequestChunk, Unpublished
from engine.kv.host_tier import ChunkMemory
from engine.kv.source import KVSource
from serving.errors import NotFound, Unavailable, Unsupported
from serving.store.heartbeat import heartbeat
from serving.trace.stages import Stage

log = logging.getLogger(__name__)

REGISTER_ATTEMPTS_MAX = 3  # of content that others displaced before the prefill service looked for it
LOADS_AT_ONCE = 4  # chunks, over all requests; each is read by several processors
LEASE_WAIT_S = 0.25
NO_LEASE_FOR_S = 2.0  # how long nobody waits for a lease after somebody waited in vain
FULL_FOR_S = 5.0  # how long a store that was full is taken to be


class NoRoomToAsk(Exception):
    """KV has to be computed, and enough requests wait for that already."""


@dataclass(frozen=True)
class FetchTerms:
    """On what terms KV is fetched for a request. ``deadline``: by the monotonic clock, in seconds.

    ``abandoned``: whether nobody wants the KV any more. ``may_ask``: whether KV may be asked for that is computed
    elsewhere; once it may, it may for the rest of the fetch.
    """

    salt: str
    deadline: float = math.inf
    abandoned: Callable[[], bool] = lambda: False
    may_ask: Callable[[], bool] = lambda: True


@dataclass(eq=False)
class Wanted:
    """A chunk to fill, the memory for it, why it was missing if it was, and how it came in the end.

    The memory of one whose outcome is ``unpublished`` is not filled: it is to be computed there.
    """

    chunk: RequestChunk
    memory: ChunkMemory
    missed: MissReason | None = None
    outcome: ChunkOutcome | None = None


class PrefillClient(Protocol):
    """Asks a prefill service for KV."""

    def compute(self, composition: Composition, index: int, terms: FetchTerms) -> ChunkKey | Unpublished:
        """Makes the KV of chunk ``index`` and of its context exist in the store; its key, or why it does not.

        Raises ``RequestError``, soon once the caller has ``abandoned`` it, and not after its deadline.
        """


class KVFetcher:
    """Fetches from ``store``, and through ``prefill_client`` what the store does not have.

    ``register`` puts a composition's content into the registry, where the prefill service looks for it.
    """

    def __init__(
        self,
        store: ChunkStore,
        prefill_client: PrefillClient,
        model: ModelIdentity,
        register: Callable[[Composition], None],
    ) -> None:
        self.store = store
        self.prefill_client = prefill_client
        self.model = model
        self.register = register
        self._loads = ThreadPoolExecutor(LOADS_AT_ONCE, thread_name_prefix="cairn-load-part")
        # By the monotonic clock: until then a tenant's KV is not asked for, which could not be stored.
        self._full_until: dict[Tenant, float] = {}
        self._no_lease_until = 0.0

    def fetch(self, composition: Composition, wanted: Sequence[Wanted], terms: FetchTerms) -> dict[Stage, int]:
        """Fills every wanted chunk, but for those that are left unpublished, and notes its outcome.

        Raises ``RequestError`` or ``NoRoomToAsk``; then the content of the memory is undefined.
        """
        fetch = _Fetch(self, composition, wanted, terms)
        try:
            fetch.run()
        except StoreUnavailable as error:
            fetch.go_without(Unpublished.STORE_UNAVAILABLE, error)
        except StoreFull as error:
            fetch.go_without(Unpublished.STORE_FULL, error)
        except StoreError as error:
            raise Unavailable(f"chunk store: {error}") from error
        return fetch.spent_ns()

    def lease(self, keys: Sequence[ChunkKey]) -> Lease | None:
        """Keeps what is stored from being evicted, or None: then what was found may be gone when it is read, a miss.

        Waits for a locked index are in turn: of many requests one waits, and the others go on without.
        """
        if time.monotonic() < self._no_lease_until:
            return None
        try:
            return self.store.lease(keys, wait_s=LEASE_WAIT_S)
        except (StoreUnavailable, StoreFull) as error:
            self._no_lease_until = time.monotonic() + NO_LEASE_FOR_S
            log.warning("KV is read without a lease, for %g s: %s", NO_LEASE_FOR_S, error)
            return None

    def ask(self, composition: Composition, index: int, terms: FetchTerms) -> Unpublished | None:
        """Has a chunk's KV computed and stored; why it could not be stored otherwise. Raises as ``fetch`` does."""
        if self._is_full(composition.tenant):
            return Unpublished.STORE_FULL
        log.info("asking the prefill service for chunk %d and what it attends to", index)
        answer = self.prefill_client.compute(composition, index, terms)
        if isinstance(answer, Unpublished):
            if answer is Unpublished.STORE_FULL:
                self._full_until[composition.tenant] = time.monotonic() + FULL_FOR_S
            return answer
        if answer != composition.chunks[index].key:
            raise Unsupported(
                "the prefill service computes under another model identity (weights, dtype, device, processor, "
                "versions or threads differ)",
                remedy=(
                    "start both services with the same model and options, and give both a --dtype if auto chose "
                    "differently for them (their ready lines and logs say what and why)"
                ),
            )
        return None

    def _is_full(self, tenant: Tenant) -> bool:
        now = time.monotonic()
        for other, until in list(self._full_until.items()):
            if until <= now:
                self._full_until.pop(other, None)
        return tenant in self._full_until

    def load_all(self, wanted: Sequence[Wanted], load: Callable[[Wanted], None]) -> None:
        """Loads side by side: one is read while another is verified or on its way to a device.

        Returns or raises when none of them writes to its memory any more.
        """
        if len(wanted) == 1:
            return load(wanted[0])
        # Each with a context of its own, for its log lines bear the request.
        jobs = [self._loads.submit(contextvars.copy_context().run, load, want) for want in wanted]
        try:
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()
            wait(jobs)


class _Fetch:
    """One fetch: what is known of each wanted chunk, and what has come of it."""

    def __init__(
        self,
        source: KVFetcher,
        composition: Composition,
        wanted: Sequence[Wanted],
        terms: FetchTerms,
    ) -> None:
        self._source = source
        self._store = source.store
        self._composition = composition
        self._wanted = wanted
        self._terms = terms
        self._ended_ns = [time.monotonic_ns()]  # of the stages: begun, looked up, computed, loaded

    def spent_ns(self) -> dict[Stage, int]:
        began, looked_up, computed, loaded = (self._ended_ns + [time.monotonic_ns()] * 3)[:4]
        return {"lookup": looked_up - began, "prefill": computed - looked_up, "load": loaded - computed}

    def run(self) -> None:
        """Raises what stores raise, ``RequestError`` and ``NoRoomToAsk``."""
        keys = [want.chunk.key for want in self._wanted]
        with self._leased(keys) as renew:
            found = self._store.lookup(keys)
            absent = [w for w, info in zip(self._wanted, found, strict=True) if info is None and not w.memory.held]
            for want in absent:
                want.missed = self._why_missing(want.chunk)
            self._ended_ns.append(time.monotonic_ns())
            if absent:
                log.info("not stored: %s", ", ".join(f"chunk {want.chunk.index} ({want.missed})" for want in absent))
                self._compute(absent, renew)
            self._ended_ns.append(time.monotonic_ns())
            unreadable = self._load([want for want in self._wanted if want.outcome is None])
            if unreadable:  # computed anew, once
                self._compute(unreadable, renew)
                unreadable = self._load([want for want in unreadable if want.outcome is None])
            for want in unreadable:
                raise Unavailable(
                    f"its KV was computed but cannot be loaded ({want.missed})",
                    field=f"segments[{want.chunk.given_index}]",
                    remedy="try again",
                )

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
                    continue
            _leave(want, why)

    def _compute(self, absent: Sequence[Wanted], renew: Callable[[], None]) -> None:
        """Asks for the deepest missing chunks; a chunk's missing context is computed with it."""
        covered: dict[int, Unpublished | None] = {}
        if not self._terms.may_ask():
            raise NoRoomToAsk
        try:
            self._source.register(self._composition)
        except StoreFull as error:  # what is stored can still be loaded
            log.warning("content is not registered: %s", error)
            for want in absent:
                _leave(want, Unpublished.STORE_FULL)
            return
        with heartbeat(renew):
            for want in sorted(absent, key=lambda want: want.chunk.index, reverse=True):
                if want.chunk.index not in covered:
                    answer = self._ask(want.chunk)
                    renew()  # at once: it covers what has just been computed, too, while the rest is
                    covered |= dict.fromkeys((want.chunk.index, *want.chunk.context), answer)
                why = covered[want.chunk.index]
                if why is not None:
                    _leave(want, why)

    def _ask(self, chunk: RequestChunk) -> Unpublished | None:
        """Asks for one chunk; again where its content was displaced before the prefill service looked for it.

        A registry that is full drops content that only passes through when other such content comes. Where that goes
        on, the chunk is left to be computed here.
        """
        for _ in range(REGISTER_ATTEMPTS_MAX):
            try:
                return self._source.ask(self._composition, chunk.index, self._terms)
            except NotFound:
                before = self._composition.chunks[: chunk.index]
                if all(each.segment.named_by_id for each in (*before, chunk)):
                    raise
            try:
                self._source.register(self._composition)
            except StoreFull as error:
                log.warning("content is not registered: %s", error)
                break
        return Unpublished.STORE_FULL

    def _load(self, wanted: Sequence[Wanted]) -> list[Wanted]:
        """Loads what can be loaded; the rest, with the reason noted."""

        def load(want: Wanted) -> None:
            chunk = want.chunk
            source, reason = want.memory.fill(lambda landing: self._store.land(chunk.key, chunk.token_ids, landing))
            if reason is None:
                want.outcome = ChunkOutcome(source if want.missed is None else KVSource.COMPUTED, want.missed)
            else:
                want.missed = want.missed or reason

        self._source.load_all(wanted, load)
        return [want for want in wanted if want.outcome is None]

    def _why_missing(self, chunk: RequestChunk) -> MissReason:
        return self._store.miss_reason(chunk.key, chunk.segment.chunk_id, self._source.model, chunk.tenant)


def _leave(want: Wanted, why: Unpublished) -> None:
    """It is to be computed by whoever asked."""
    want.outcome = ChunkOutcome(KVSource.COMPUTED, want.missed or MissReason.LOAD_FAILED, why)
