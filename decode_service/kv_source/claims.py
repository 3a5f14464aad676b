"""KV that is missing and computed here: claimed in the store first, so that no other process computes it, too.

Stands where a prefill service would be asked. Runs in loader threads; what it claims is computed in rows of the request
that lacks it, and goes to the publisher when it is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from chunk_store.entry import EntryHeader, EntryInfo
from chunk_store.errors import ClaimLost, StoreFull
from chunk_store.key import ModelIdentity
from chunk_store.layout import KVLayout
from chunk_store.store import Busy, ChunkStore, Stored
from chunk_store.tenant import NO_LIMITS, Tenant, TenantLimits
from decode_service.kv_source.asking import ComputedChunk, FetchTerms
from decode_service.kv_source.full_stores import FullStores
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import RequestChunk, Unpublished
from engine.kv.resident import ResidentChunk
from serving.errors import Cancelled, Overloaded, Unavailable
from serving.publishing.held import HeldClaim, end_quietly
from serving.publishing.item import Publishing
from serving.publishing.publisher import Publisher
from serving.publishing.room import Place, give_up, given
from serving.store.heartbeat import TTL_S

BUSY_WAIT_S_MAX = 120.0  # for another process to finish what it has claimed
ROOM_WAIT_S = 1.0  # behind a full queue of what is to be stored, before a chunk is computed for this pool alone
STORE_WAIT_S = 10.0  # the same, where it is computed to be stored
BEHIND_FOR_S = 5.0  # how long nobody waits for room after somebody waited in vain
LOOK_S = 0.25  # between two looks whether somebody still waits

log = logging.getLogger(__name__)


class StoreClaim:
    """The right to publish one chunk's KV."""

    def __init__(
        self, claims: ChunkClaims, held: HeldClaim, header: EntryHeader, limits: TenantLimits, asked: Future[Place]
    ) -> None:
        self._going: Publishing | None = None
        self.held = held
        self._claims = claims
        self._header = header
        self._limits = limits
        self._asked = asked

    def publish(self, chunk: ResidentChunk) -> None:
        """Hands the chunk to the publisher."""
        publisher = self._claims.publisher
        try:
            self._going = publisher.submit(self._asked, self._header, chunk, self.held, self._limits)
        except Unavailable as error:  # it is shutting down
            log.warning("chunk %s is not stored: %s", self._header.chunk_id, error)
            self.drop()
            return
        self._claims.ended(self)
        self._going.add_done_callback(self._done)

    def going(self) -> Publishing:
        """The publication under way, once ``publish`` was called; one that has failed if it was dropped."""
        if self._going is not None:
            return self._going
        failed = Publishing()
        failed.computed.set_result(None)
        failed.set_exception(ClaimLost("nobody publishes it any more", "begin again"))
        return failed

    def drop(self) -> None:
        give_up(self._asked)
        self._claims.drop(self)

    def _done(self, going: Future[EntryInfo]) -> None:
        if isinstance(going.exception(), StoreFull):
            self._claims.full.note(self._header.tenant)


class ChunkClaims:
    """Claims chunks in ``store`` for who computes them, and publishes them with ``publisher``.

    ``limits_of`` says what a tenant may have stored.
    """

    def __init__(
        self,
        store: ChunkStore,
        publisher: Publisher,
        model: ModelIdentity,
        layout: KVLayout,
        limits_of: Callable[[Tenant], TenantLimits],
    ) -> None:
        self.store = store
        self.publisher = publisher
        self._model = model
        self._layout = layout
        self._limits_of = limits_of
        self._open: set[StoreClaim] = set()
        self._lock = threading.Lock()
        self.full = FullStores()
        self._behind_until = 0.0
        self._dropping = ThreadPoolExecutor(1, thread_name_prefix="cairn-drop-claims")

    def compute_all(
        self, composition: Composition, indices: Sequence[int], terms: FetchTerms
    ) -> Iterator[ComputedChunk]:
        """Yields missing chunks in order, each with a claim to compute it here, or as stored meanwhile by another one.

        A claim is held by who can go on with it at once: nothing is claimed whose context another process computes,
        and what it holds up is claimed later. Raises ``RequestError`` and what stores raise.
        """
        left, busy_until = list(indices), time.monotonic() + BUSY_WAIT_S_MAX
        while left:
            waited_for: set[int] = set()
            retry_s = 0.0
            for index in left:
                chunk = composition.chunks[index]
                if waited_for & {*chunk.context}:
                    waited_for.add(index)
                    continue
                found = self.claim(composition, chunk, terms)
                if isinstance(found, Busy):
                    waited_for.add(index)
                    retry_s = min(retry_s or found.retry_after_s, found.retry_after_s)
                else:
                    yield found
            left = [index for index in left if index in waited_for]
            if left:
                _pause(retry_s, min(busy_until, terms.deadline), terms)

    def claim(self, composition: Composition, chunk: RequestChunk, terms: FetchTerms) -> ComputedChunk | Busy:
        """What becomes of one chunk now."""
        if chunk.tenant in self.full and not terms.insist:
            return ComputedChunk(chunk.index, chunk.key, unpublished=Unpublished.STORE_FULL)
        header = self._header(composition, chunk)
        if self.publisher.in_memory(chunk.key):
            return ComputedChunk(chunk.index, chunk.key, durable=False, read=partial(self.publisher.read, chunk.key))
        asked = self._room(header.nbytes, terms)
        if asked is None:
            return ComputedChunk(chunk.index, chunk.key, unpublished=Unpublished.STORE_UNAVAILABLE)
        try:
            answer = self.store.begin(chunk.key, ttl_s=TTL_S)
        except BaseException:
            give_up(asked)
            raise
        if isinstance(answer, Stored | Busy):
            give_up(asked)
            return answer if isinstance(answer, Busy) else ComputedChunk(chunk.index, chunk.key)
        limits = self._limits_of(chunk.tenant) if chunk.tenant == composition.tenant else NO_LIMITS
        held = self.publisher.claims.hold(chunk.key, answer)
        claim = StoreClaim(self, held, header, limits, asked)
        with self._lock:
            self._open.add(claim)
        return ComputedChunk(chunk.index, chunk.key, durable=False, claim=claim)

    def _room(self, nbytes: int, terms: FetchTerms) -> Future[Place] | None:
        """A place among what is to be stored, now or behind the computation; None if there is none for long.

        An answer waits for room next to never: its chunk does, in the pool. Who insists on storing waits longer.
        """
        asked = self.publisher.ask_behind(nbytes)
        if asked is not None:
            return asked
        now = time.monotonic()
        wait_s = STORE_WAIT_S if terms.insist else ROOM_WAIT_S if now >= self._behind_until else 0.0
        try:
            return given(self.publisher.reserve(nbytes, min(now + wait_s, terms.deadline), terms.abandoned))
        except Overloaded as error:
            if time.monotonic() >= self._behind_until:
                log.warning("chunks are computed and not stored, for %g s: %s", BEHIND_FOR_S, error)
                self._behind_until = time.monotonic() + BEHIND_FOR_S
            return None

    def _header(self, composition: Composition, chunk: RequestChunk) -> EntryHeader:
        return EntryHeader(
            key=chunk.key,
            chunk_id=chunk.segment.chunk_id,
            model=self._model,
            layout=self._layout,
            token_ids=chunk.token_ids,
            context=tuple(composition.chunks[index].key for index in chunk.context),
            salt_digest=chunk.tenant,
        )

    # -- claims that are open -----------------------------------------------------------------------
    def ended(self, claim: StoreClaim) -> None:
        """It is somebody else's from now on."""
        with self._lock:
            self._open.discard(claim)

    def drop(self, claim: StoreClaim) -> None:
        """Gives a claim up, in a thread of its own: the store may take its time."""
        self.ended(claim)
        try:
            self._dropping.submit(end_quietly, claim.held)
        except RuntimeError:  # it is shutting down, and closing the store ends all claims
            log.debug("a claim runs out or ends with the store")

    def stop(self) -> None:
        """Ends the claims that are left. After the device thread, which drops its own."""
        with self._lock:
            left = list(self._open)
        for claim in left:
            claim.drop()
        self._dropping.shutdown(wait=True)


def _pause(seconds: float, until: float, terms: FetchTerms) -> None:
    """Waits while another process computes. Raises ``Cancelled`` or ``Unavailable`` when that is over."""
    ends_at = time.monotonic() + seconds
    if ends_at > until:
        raise Unavailable("another process has not finished the KV that this needs", remedy="try again")
    while (left_s := ends_at - time.monotonic()) > 0:
        if terms.abandoned():
            raise Cancelled("nobody waits for this KV any more")
        time.sleep(min(LOOK_S, left_s))
