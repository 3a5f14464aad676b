"""Where the worker gets KV that is not resident: the chunk store, and the prefill service for what is missing.

Runs in loader threads. One ``fetch`` brings in all that one composition lacks; it holds leases meanwhile,
so nothing that it found is evicted before it is loaded. It does not know the pool: it fills the memory given. What
the store cannot take or give, it leaves to whoever asked to compute.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from chunk_store.errors import StoreError, StoreFull, StoreUnavailable
from chunk_store.key import ChunkKey, ModelIdentity
from chunk_store.store import ChunkStore, Lease
from decode_service.kv_source.asking import ComputedChunk, FetchTerms, PrefillClient, Wanted
from decode_service.kv_source.fetch import Fetch
from decode_service.kv_source.full_stores import FullStores
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import Unpublished
from serving.errors import Unavailable, Unsupported
from serving.handover.borrower import Borrower
from serving.trace.stages import Stage

log = logging.getLogger(__name__)

LOADS_AT_ONCE = 4  # chunks, over all requests; each is read by several processors
LEASE_WAIT_S = 0.25
NO_LEASE_FOR_S = 2.0  # how long nobody waits for a lease after somebody waited in vain


class KVFetcher:
    """Fetches from ``store``, and through ``prefill_client`` what the store does not have.

    ``register`` puts a composition's content into the registry, where the prefill service looks for it. ``borrower``
    copies what a prefill service of this host has just computed.
    """

    def __init__(
        self,
        store: ChunkStore,
        prefill_client: PrefillClient,
        model: ModelIdentity,
        register: Callable[[Composition], None],
        borrower: Borrower | None = None,
    ) -> None:
        self.store = store
        self.prefill_client = prefill_client
        self.model = model
        self.register = register
        self.borrower = borrower
        self.load_threads = ThreadPoolExecutor(LOADS_AT_ONCE, thread_name_prefix="cairn-load-part")
        self.full = FullStores()
        self._no_lease_until = 0.0

    def fetch(self, composition: Composition, wanted: Sequence[Wanted], terms: FetchTerms) -> dict[Stage, int]:
        """Fills every wanted chunk, but for those that are left unpublished, and notes its outcome.

        Raises ``RequestError`` or ``NoRoomToAsk``; then the content of the memory is undefined, but for that of chunks
        that ``terms.came`` was told of.
        """
        fetch = Fetch(self, composition, wanted, terms)
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

    def ask(self, composition: Composition, indices: Sequence[int], terms: FetchTerms) -> Iterator[ComputedChunk]:
        """Has chunks computed and stored, in one call; each as soon as it is, or why it cannot be stored.

        Raises as ``fetch`` does.
        """
        if composition.tenant in self.full and not terms.insist:
            for index in indices:
                yield ComputedChunk(index, composition.chunks[index].key, unpublished=Unpublished.STORE_FULL)
            return
        log.info("asking for chunks %s and what they attend to", ", ".join(map(str, indices)))
        for made in self.prefill_client.compute_all(composition, indices, terms):
            if made.unpublished is Unpublished.STORE_FULL:
                self.full.note(composition.tenant)
            if made.key != composition.chunks[made.index].key:
                raise _other_identity()
            yield made


def _other_identity() -> Unsupported:
    return Unsupported(
        "the prefill service computes under another model identity (weights, adapter, dtype, device, "
        "attention, processor, versions or threads differ)",
        remedy=(
            "start both services with the same model and options, and give both a --dtype or --attention if auto "
            "chose differently for them (their ready lines and logs say what and why)"
        ),
    )
