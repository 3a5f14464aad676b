"""``ChunkStore`` made of a ledger (rules) and blobs (data). Every backend is one pair of them.

Order of the steps decides what a crash leaves behind. Publish: claim, reserve, write blob, commit. Remove: the
ledger turns the entry into garbage, the blob goes, the ledger forgets the garbage. A process that dies between two
steps leaves a claim or garbage that any other process finishes off; never an entry without its bytes.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from chunk_store.blobs import Blobs, Expected
from chunk_store.entry import EntryHeader, EntryInfo, MissReason
from chunk_store.errors import (
    BlobBad,
    BlobMissing,
    BlobOtherVersion,
    BlobUnreadable,
    ClaimLost,
    NoSpace,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from chunk_store.format.header import flat_views, header_nbytes, writable_views
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.ledger import Leases, Ledger, ReadTicket, blob_name, check_key
from chunk_store.limits import Space
from chunk_store.store import Busy, DeleteReport, Lease, Publication, Stored, StoreStats, SweepReport
from chunk_store.tenant import DEFAULT_ONLY, NO_LIMITS, TenantLimits, Tenants

log = logging.getLogger(__name__)

RESERVE_ATTEMPTS_MAX = 64
LOAD_ATTEMPTS_MAX = 3
WRITE_ATTEMPTS_MAX = 8


class SharedStore:
    """One store, many processes; see ``ChunkStore`` for what each call promises."""

    def __init__(self, ledger: Ledger, blobs: Blobs) -> None:
        self.ledger = ledger
        self.blobs = blobs
        self._lock = threading.Lock()
        self._open_claims: set[SharedPublication] = set()
        # What the ledger answers alone, it is asked directly.
        self.put_records, self.get_records = ledger.records.put, ledger.records.get
        self.list_records, self.set_pinned = ledger.records.page, ledger.records.set_pinned
        self.lookup, self.list_entries = ledger.entries.find, ledger.entries.listed
        self.miss_reason = ledger.entries.miss_reason
        self.tenants, self.usage = ledger.upkeep.tenants, ledger.upkeep.usage
        self.identity = ledger.upkeep.identity

    def delete_chunks(self, chunk_ids: Sequence[ChunkId], tenants: Tenants = DEFAULT_ONLY) -> DeleteReport:
        report = self.ledger.records.delete(chunk_ids, tenants)
        self._remove_garbage()
        return report

    def delete_model(self, model: ModelIdentity) -> DeleteReport:
        report = self.ledger.entries.delete_model(model)
        self._remove_garbage()
        return report

    def begin(self, key: ChunkKey, *, ttl_s: float = 30.0) -> Publication | Stored | Busy:
        check_key(key)
        nonce = secrets.token_hex(8)
        answer = self.ledger.claims.claim(key, nonce, ttl_s)
        if answer is not None:
            return answer
        publication = SharedPublication(self.ledger, self.blobs, key, nonce, ttl_s, self._close_claim)
        with self._lock:
            self._open_claims.add(publication)
        return publication

    def load(self, key: ChunkKey, token_ids: Sequence[int], buffers: Sequence[memoryview]) -> MissReason | None:
        views = writable_views(buffers)
        expected = Expected(key, token_ids)
        reason: MissReason | None = MissReason.LOAD_FAILED
        for _ in range(LOAD_ATTEMPTS_MAX):
            ticket = self.ledger.leases.begin_read(key)
            if isinstance(ticket, MissReason):
                return ticket
            try:
                settled, reason = self._read(ticket, expected, views)
            finally:
                self.ledger.leases.end_read(ticket)
            if settled:
                break
        return reason

    def _read(
        self, ticket: ReadTicket, expected: Expected, views: Sequence[memoryview]
    ) -> tuple[bool, MissReason | None]:
        """Whether the answer stands, and the answer; it does not when the entry changed under the reader."""
        try:
            self.blobs.read(ticket.blob, expected, views)
        except BlobMissing as error:
            if not self.ledger.entries.forget(ticket.key, ticket.blob, quarantined=False):
                return False, MissReason.LOAD_FAILED
            log.warning("load_failed: the data of key %s is gone (%s); the entry is dropped", ticket.key, error)
            return True, MissReason.LOAD_FAILED
        except BlobUnreadable as error:
            log.warning("load_failed: key %s cannot be read now (%s)", ticket.key, error)
            return True, MissReason.LOAD_FAILED
        except BlobOtherVersion as error:
            if not self.ledger.entries.forget(ticket.key, ticket.blob, quarantined=False):
                return False, MissReason.FORMAT_DIFFERS
            log.warning("format_differs: key %s: %s; it will be computed and stored anew", ticket.key, error)
            self._remove_garbage()
            return True, MissReason.FORMAT_DIFFERS
        except BlobBad as error:
            # First out of the way: what the ledger has forgotten is garbage, and anybody may remove it.
            kept = self.blobs.quarantine(ticket.blob)
            # Of all its readers in all processes one drops the entry: one line for each bad blob.
            if self.ledger.entries.forget(ticket.key, ticket.blob, quarantined=True):
                log.error("verify_failed: key %s: %s; quarantined, %s", ticket.key, error, kept)
                self._remove_garbage()
                return True, MissReason.VERIFY_FAILED
            return False, MissReason.VERIFY_FAILED
        return True, None

    def lease(self, keys: Sequence[ChunkKey], *, ttl_s: float = 30.0, wait_s: float | None = None) -> Lease:
        lease = SharedLease(self.ledger.leases, tuple(keys), ttl_s, wait_s)
        lease.renew()
        return lease

    def sweep(self) -> SweepReport:
        report = self.ledger.upkeep.sweep(self.blobs.quarantined())
        self._remove_garbage()
        return report

    def stats(self) -> StoreStats:
        return self.ledger.upkeep.stats(self.blobs.kind)

    def close(self) -> None:
        with self._lock:
            claims = list(self._open_claims)
        for publication in claims:
            try:
                publication.abort()
            except StoreError:
                continue  # the store is gone; the claim runs out by itself
        self.ledger.close()
        self.blobs.close()

    def _remove_garbage(self) -> None:
        blobs = self.ledger.upkeep.garbage()
        if blobs:
            self.ledger.upkeep.discard(self.blobs.remove(blobs))

    def _close_claim(self, publication: SharedPublication) -> None:
        with self._lock:
            self._open_claims.discard(publication)


class SharedPublication:
    """A claim on one key; see ``Publication``."""

    def __init__(
        self,
        ledger: Ledger,
        blobs: Blobs,
        key: ChunkKey,
        nonce: str,
        ttl_s: float,
        on_end: Callable[[SharedPublication], None],
    ) -> None:
        self._ledger = ledger
        self._blobs = blobs
        self._key = key
        self._nonce = nonce
        self._ttl_s = ttl_s
        self._on_end = on_end
        self._header: EntryHeader | None = None
        self._ended = False

    def renew(self) -> None:
        self._check_open()
        self._ledger.claims.renew(self._key, self._nonce, self._ttl_s)

    def write(self, header: EntryHeader, buffers: Sequence[memoryview], *, limits: TenantLimits = NO_LIMITS) -> None:
        self._check_open()
        if self._header is not None:
            raise StoreError("write was already called for this publication")
        if header.key != self._key:
            raise ValueError(f"header.key: {header.key} is not the claimed key {self._key}")
        views = flat_views(buffers, header.layout.plane_nbytes(len(header.token_ids)))
        nbytes = header_nbytes(header) + header.nbytes
        blob = blob_name(self._key, self._nonce)
        self._reserve(Space(nbytes, header.tenant, limits.nbytes))
        for _ in range(WRITE_ATTEMPTS_MAX):
            try:
                self._blobs.write(blob, header, views)
                self._header = header
                return
            except NoSpace as error:
                self._make_room(blob, nbytes, error)
        raise StoreFull(f"no room for {nbytes} bytes after evicting {WRITE_ATTEMPTS_MAX} times: is the medium there?")

    def commit(self) -> EntryInfo:
        self._check_open()
        if self._header is None:
            raise StoreError("commit needs write first")
        info = self._ledger.claims.commit(self._key, self._nonce, self._header)
        self._end()
        return info

    def abort(self) -> None:
        if self._ended:
            return
        self._end()
        blob = blob_name(self._key, self._nonce)
        if self._ledger.claims.drop(self._key, self._nonce):
            self._ledger.upkeep.discard(self._blobs.remove([blob]))
            return
        placed = self._ledger.entries.locate(self._key)
        if placed is None or placed.blob != blob:  # it is, when a commit was done and its answer got lost
            self._blobs.remove([blob])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.abort()
        except StoreUnavailable:
            if error is None:
                raise  # an error that is already on its way tells more

    def _reserve(self, space: Space) -> None:
        removed: list[str] = []
        for _ in range(RESERVE_ATTEMPTS_MAX):
            garbage = self._ledger.claims.reserve(self._key, self._nonce, space, removed)
            if not garbage:
                return
            removed = self._blobs.remove(garbage)
        raise StoreFull(f"no room for {space.nbytes} bytes: other writers took what was evicted; try again")

    def _make_room(self, blob: str, nbytes: int, cause: NoSpace) -> None:
        """Evicts as much as is to be written. Raises ``StoreFull`` when there is nothing to evict."""
        self._blobs.remove([blob])
        garbage = self._ledger.claims.evict(nbytes)
        if not garbage:
            raise StoreFull(f"the store's medium is full: {cause}") from cause
        self._ledger.upkeep.discard(self._blobs.remove(garbage))

    def _check_open(self) -> None:
        if self._ended:
            raise ClaimLost("the publication has ended (committed, aborted, or its store was closed)")

    def _end(self) -> None:
        self._ended = True
        self._on_end(self)


class SharedLease:
    """A lease on some keys; see ``Lease``."""

    def __init__(self, leases: Leases, keys: tuple[ChunkKey, ...], ttl_s: float, wait_s: float | None) -> None:
        self._leases = leases
        self._keys = keys
        self._ttl_s = ttl_s
        self._wait_s = wait_s
        self._name = secrets.token_hex(8)
        self._released = False

    def renew(self) -> None:
        if self._released:
            raise StoreError("the lease was released")
        self._leases.hold(self._name, self._keys, self._ttl_s, self._wait_s)

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._leases.end(self._name, self._keys, self._wait_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
