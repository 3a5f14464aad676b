"""Where the worker gets KV that is not resident: the chunk store, and the prefill service for what is missing.

Runs in loader threads. One ``fetch`` brings in all that one composition lacks; it holds leases meanwhile,
so nothing that it found is evicted before it is loaded. It does not know the pool: it fills the memory given.
"""

from __future__ import annotations

import contextvars
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.store import ChunkStore, Lease, MissReason, StoreError
from chunk_store.tenant import Tenant
from decode_service.composition import Composition
from decode_service.sequence import ChunkOutcome, Source
from serving.heartbeat import heartbeat

log = logging.getLogger(__name__)

Abandoned = Callable[[], bool]  # whether nobody wants the KV any more


LOADS_AT_ONCE = 4  # chunks, over all requests; each is read by several processors


class FetchFailed(Exception):
    """KV could not be had. ``code`` names the gRPC status that the request ends with."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


Read = Callable[[Sequence[memoryview]], MissReason | None]


class Memory(Protocol):
    """Where a chunk's KV goes: pages of the pool, straight or through host memory."""

    @property
    def held(self) -> bool:
        """Whether ``fill`` would need no reading now."""
        ...

    def fill(self, read: Read) -> tuple[Source, MissReason | None]:
        """Brings the KV into the pages, by ``read`` into buffers of layout order if it must.

        Returns where it was, and why it could not be read; the content of the pages is then undefined.
        """
        ...


@dataclass(frozen=True)
class Wanted:
    """A chunk to fill: its place in the composition and the memory for it."""

    index: int
    memory: Memory


@dataclass(frozen=True)
class Fetched:
    """How the wanted chunks came, by index in the composition, and nanoseconds spent a stage."""

    outcomes: dict[int, ChunkOutcome]
    lookup_ns: int
    prefill_ns: int
    load_ns: int


class Prefiller(Protocol):
    """Asks a prefill service for KV."""

    def compute(self, composition: Composition, index: int, salt: str, abandoned: Abandoned) -> ChunkKey:
        """Makes the KV of chunk ``index`` and of its context exist in the store; returns the chunk's key.

        Raises ``FetchFailed``, soon once it is ``abandoned``.
        """


class StoreSource:
    """Fetches from ``store``, and through ``prefiller`` what the store does not have."""

    def __init__(self, store: ChunkStore, prefiller: Prefiller, model: ModelIdentity) -> None:
        self.store = store
        self.prefiller = prefiller
        self.model = model
        self._loads = ThreadPoolExecutor(LOADS_AT_ONCE, thread_name_prefix="cairn-load-part")

    def fetch(
        self,
        composition: Composition,
        wanted: Sequence[Wanted],
        salt: str,
        tenant: Tenant,
        abandoned: Abandoned = lambda: False,
    ) -> Fetched:
        """Fills every wanted chunk. Raises ``FetchFailed``; then the content of the memory is undefined."""

        def ask(index: int) -> None:
            self._ask(composition, index, salt, abandoned)

        try:
            return self._fetch(composition, wanted, tenant, ask)
        except StoreError as error:
            raise FetchFailed("UNAVAILABLE", f"chunk store: {error}") from error

    def _fetch(
        self, composition: Composition, wanted: Sequence[Wanted], tenant: Tenant, ask: Callable[[int], None]
    ) -> Fetched:
        keys = [composition.chunks[want.index].key for want in wanted]
        started = time.monotonic_ns()
        with self.store.lease(keys) as lease:
            found = self.store.lookup(keys)
            missing = {
                want.index: self._why_missing(composition, want.index, tenant)
                for want, info in zip(wanted, found, strict=True)
                if info is None and not want.memory.held
            }
            looked_up = time.monotonic_ns()
            if missing:
                with heartbeat(lease.renew):
                    self._compute(composition, missing, ask, lease)
            computed = time.monotonic_ns()

            def load(want: Wanted) -> ChunkOutcome:
                return self._load(composition, want, missing.get(want.index), ask, lease)

            outcomes = self._load_all(wanted, load)
        loaded = time.monotonic_ns()
        return Fetched(outcomes, looked_up - started, computed - looked_up, loaded - computed)

    def _load_all(self, wanted: Sequence[Wanted], load: Callable[[Wanted], ChunkOutcome]) -> dict[int, ChunkOutcome]:
        """Loads side by side: one is read while another is verified or on its way to a device.

        Returns or raises when none of them writes to its memory any more.
        """
        if len(wanted) == 1:
            return {wanted[0].index: load(wanted[0])}
        # Each with a context of its own, for its log lines bear the request.
        jobs = [self._loads.submit(contextvars.copy_context().run, load, want) for want in wanted]
        try:
            return {want.index: job.result() for want, job in zip(wanted, jobs, strict=True)}
        finally:
            for job in jobs:
                job.cancel()
            wait(jobs)

    def _why_missing(self, composition: Composition, index: int, tenant: Tenant) -> MissReason:
        part, keyed = composition.parts[index], composition.chunks[index]
        return self.store.miss_reason(keyed.key, ChunkId(part.chunk_id), self.model, tenant)

    def _compute(
        self, composition: Composition, missing: dict[int, MissReason], ask: Callable[[int], None], lease: Lease
    ) -> None:
        """Asks for the deepest missing chunks; a chunk's missing context is computed with it."""
        covered: set[int] = set()
        for index in sorted(missing, reverse=True):
            if index not in covered:
                ask(index)
                lease.renew()  # at once: it covers what has just been computed, too, while the rest is
                covered.update(composition.chunks[index].context)

    def _ask(self, composition: Composition, index: int, salt: str, abandoned: Abandoned) -> None:
        log.info("chunk %d has to be computed: asking the prefill service", index)
        key = self.prefiller.compute(composition, index, salt, abandoned)
        if key != composition.chunks[index].key:
            raise FetchFailed(
                "FAILED_PRECONDITION",
                "the prefill service computes under another model identity (weights, dtype, device, processor, "
                "versions or threads differ); start both services with the same model and options, and give both a "
                "--dtype if auto chose differently for them (their ready lines and logs say what and why)",
            )

    def _load(
        self,
        composition: Composition,
        want: Wanted,
        missed: MissReason | None,
        ask: Callable[[int], None],
        lease: Lease,
    ) -> ChunkOutcome:
        """Loads one chunk; what turns out unreadable is computed anew, once."""
        keyed = composition.chunks[want.index]

        def read(buffers: Sequence[memoryview]) -> MissReason | None:
            return self.store.load(keyed.key, keyed.token_ids, buffers)

        source, reason = want.memory.fill(read)
        if reason is not None:
            missed = missed or reason
            ask(want.index)
            lease.renew()
            _, reason = want.memory.fill(read)
        if reason is not None:
            raise FetchFailed(
                "UNAVAILABLE", f"segments[{want.index}]: its KV was computed but cannot be loaded ({reason}); try again"
            )
        return ChunkOutcome(source if missed is None else Source.COMPUTED, missed)
