"""Turns that are kept: what becomes of a query and its answer when the answer is over.

    the answer is over --> its tail was copied (``kept.py``) --> registered --> named in the pool     RESIDENT
                           here chunks have other bits       --> registered --> asked for, behind     COMPUTING
                           no room, no record, a full queue                                           NONE

Registered first: whoever is told of a turn can name it. Nothing that is not kept is lost: a request that names the
turn, or sends its token ids, has its KV computed as that of any other chunk. What is kept passes through: its record
makes room for other content, and its KV goes when its pages are wanted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from chunk_store.errors import StoreError, StoreFull
from chunk_store.tenant import Tenant
from decode_service.device.worker import DecodeWorker
from decode_service.kv_source.asking import ComputedChunk, FetchTerms
from decode_service.kv_source.claims import ChunkClaims
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import Claim
from decode_service.prompt.resolver import Resolver
from decode_service.scheduling import kept
from decode_service.scheduling.kept import Keep, Kept, KeptKV, NotKept
from decode_service.scheduling.sequence import ChunkReady, Event, Sequence
from engine.kv.resident import ResidentChunk
from engine.sampling.params import SamplingParams, SamplingRequest
from serving.errors import RequestError, Unavailable

log = logging.getLogger(__name__)

COMPUTING_MAX = 16  # turns whose KV is asked for at once; a conversation has one
TENANT_COMPUTING_MAX = 8  # of one tenant
PUBLISHING_MAX = 64  # kept chunks that wait for their claims; what comes then stays in the pool alone
CLAIM_S = 30.0  # how long a claim, and room in the publisher's queue, are waited for
COMPUTE_S = 60.0  # how long that may take; whoever needs it later asks again
NO_SAMPLING = SamplingRequest(SamplingParams(), (), frozenset())

ClaimTurn = Callable[[Composition], "Claim | None"]


def claim_with(claims: ChunkClaims) -> ClaimTurn:
    """Claims turns as chunks are claimed that are computed here."""

    def claim(turn: Composition) -> Claim | None:
        found = claims.claim(turn, turn.chunks[-1], FetchTerms("", deadline=time.monotonic() + CLAIM_S))
        return found.claim if isinstance(found, ComputedChunk) else None

    return claim


class TurnKeeper:
    """Keeps turns of one worker's requests."""

    def __init__(self, worker: DecodeWorker, resolver: Resolver, claim: ClaimTurn | None = None) -> None:
        """``claim`` is the right to publish a turn's last chunk, None where another process has it, or it is stored.

        It may take its time. Without it turns are kept in the pool alone.
        """
        self._worker = worker
        self._resolver = resolver
        self._claim = claim
        self._publishing = 0  # chunks that wait for their claims
        self._claims = ThreadPoolExecutor(1, thread_name_prefix="cairn-kept")
        self._computing: Counter[Tenant] = Counter()  # requests for chunks that are under way
        self._lock = threading.Lock()

    def begin(self) -> Keep:
        """For a sequence that keeps its turn."""
        return Keep(self._copies)

    def _copies(self, tokens: int) -> bool:
        """Whether rows of a chunk of so many tokens have the bits of a tail's, one at a time or together."""
        row_bits = self._resolver.served.row_bits
        return (row_bits is None or row_bits.equal) and not self._worker.runner.alone(tokens, chunk=True)

    def keep(self, sequence: Sequence, answer: Items[int]) -> Kept | None:
        """Keeps a turn whose sequence has ended; ``answer`` are the tokens that its caller was given.

        None if that are none. To be called in a thread, where the store may take its time.
        """
        state = sequence.keep
        if state is None or not answer:
            return None
        turn = self._resolver.turn(sequence.composition, answer, sequence.salt)
        chunk, query = turn.chunks[-1], sequence.composition.segments[-1].token_ids
        why = self._register(turn)
        left = state.left
        if left is not None and left.tokens >= len(chunk.token_ids) - len(query) + len(sequence.composition.tail):
            kv = KeptKV.RESIDENT
            self._post(partial(self._name, state, turn))
        elif why is not None:
            kv = KeptKV.NONE
        elif state.pool_full:
            kv, why = KeptKV.NONE, NotKept.POOL_FULL
        else:
            kv, why = self._compute(sequence, turn)
        self._worker.metrics.kept(kv, why)
        registered = why in (None, NotKept.POOL_FULL, NotKept.QUEUE_FULL)
        return Kept(chunk.segment.chunk_id, query, registered, kv, why)

    def forget(self, sequence: Sequence) -> None:
        """The call is over, however it ended: what it left and nobody named goes, now or when the sequence ends."""
        if sequence.keep is not None:
            self._post(partial(kept.forget, self._worker.residents, sequence.keep))

    def _post(self, function: Callable[[], None]) -> None:
        try:
            self._worker.call(function)
        except Unavailable:  # the device thread has ended, and with it the pool
            log.debug("a turn is not kept: the device thread has ended")

    def _register(self, turn: Composition) -> NotKept | None:
        try:
            self._resolver.register_turn(turn)
        except StoreFull as error:
            log.warning("a turn is not registered: %s", error)
            return NotKept.STORE_FULL
        except StoreError as error:
            log.warning("a turn is not registered: %s", error)
            return NotKept.STORE_UNAVAILABLE
        return None

    def _name(self, state: Keep, turn: Composition) -> None:
        """In the device thread, before whatever comes after the answer's last message."""
        chunk = turn.chunks[-1]
        named = kept.name(self._worker.residents, state, chunk.key, len(chunk.token_ids))
        if named is None:
            return
        self._worker.residents.release(named)  # who wants its pages need not wait until it is claimed
        if self._claim is None or self._publishing >= PUBLISHING_MAX:
            log.info("a kept turn of %d tokens stays in the pool alone", named.tokens)
            return
        try:
            self._claims.submit(self._publish, turn, named)
        except RuntimeError:
            log.debug("a kept turn stays in the pool alone: the service is stopping")
        else:
            self._publishing += 1

    def _publish(self, turn: Composition, named: ResidentChunk) -> None:
        """In a thread of its own: claims the turn, then has it handed to the publisher."""
        claim: Claim | None = None
        try:
            assert self._claim is not None
            claim = self._claim(turn)
        except (RequestError, StoreError) as error:
            log.warning("a kept turn is not published: %s", error)
        except Exception:
            log.exception("a kept turn is not published")
        try:
            self._worker.call(partial(self._hand_on, named, claim))
        except Unavailable:  # the device thread has ended
            if claim is not None:
                claim.drop()

    def _hand_on(self, named: ResidentChunk, claim: Claim | None) -> None:
        """In the device thread: from here on the publisher holds what it needs."""
        self._publishing -= 1
        if claim is None:
            return
        if self._worker.residents.find(named.key) is named:
            claim.publish(named)
        else:
            claim.drop()

    def stop(self) -> None:
        """Claims nothing more; a claim that comes now is dropped when the device thread has ended."""
        self._claims.shutdown(wait=False, cancel_futures=True)

    def _compute(self, sequence: Sequence, turn: Composition) -> tuple[KeptKV, NotKept | None]:
        """Asks for a turn's KV as a request for chunks, which whoever names the turn meanwhile waits for, too."""
        tenant = turn.tenant
        with self._lock:
            if self._computing[tenant] >= TENANT_COMPUTING_MAX or self._computing.total() >= COMPUTING_MAX:
                return KeptKV.NONE, NotKept.QUEUE_FULL
            self._computing[tenant] += 1
        asking = Sequence(
            f"{sequence.request_id} kept",
            turn,
            NO_SAMPLING,
            sequence.salt,
            False,
            partial(self._told, tenant),
            sequence.owner,
            deadline=time.monotonic() + COMPUTE_S,
        )
        try:
            self._worker.check_size(asking)
            self._worker.submit(asking)
        except RequestError as error:
            self._computed(tenant)
            log.info("a kept turn is not computed: %s", error)
            return KeptKV.NONE, NotKept.POOL_FULL
        return KeptKV.COMPUTING, None

    def _told(self, tenant: Tenant, events: list[Event]) -> None:
        """Of a request for chunks: its last event ends it."""
        if not isinstance(events[-1], ChunkReady):
            self._computed(tenant)

    def _computed(self, tenant: Tenant) -> None:
        with self._lock:
            self._computing[tenant] -= 1
            self._computing += Counter()  # forgets who has none
