"""``ChunkStore`` made of a ledger (rules) and blobs (data). Every backend is one pair of them.

Order of the steps decides what a crash leaves behind. Publish: claim, reserve, write blob, commit. Remove: the
ledger turns the entry into garbage, the blob goes, the ledger forgets the garbage. A process that dies between two
steps leaves a claim or garbage that any other process finishes off; never an entry without its bytes.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from chunk_store.blobs import Blobs, Expected
from chunk_store.entry import MissReason
from chunk_store.errors import (
    BlobBad,
    BlobMissing,
    BlobOtherVersion,
    BlobUnreadable,
    StoreError,
)
from chunk_store.format.header import writable_views
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.landing import Buffers, Landing
from chunk_store.ledger import Leases, Ledger, ReadTicket, check_key
from chunk_store.publication import SharedPublication
from chunk_store.store import Busy, Claim, DeleteReport, Lease, Publication, Stored, StoreStats, SweepReport
from chunk_store.tenant import DEFAULT_ONLY, DEFAULT_TENANT, Tenant, Tenants
from chunk_store.uses import UseCounts

log = logging.getLogger(__name__)

LOAD_ATTEMPTS_MAX = 3


class SharedStore:
    """One store, many processes; see ``ChunkStore`` for what each call promises."""

    def __init__(self, ledger: Ledger, blobs: Blobs) -> None:
        self.ledger = ledger
        self.blobs = blobs
        self._lock = threading.Lock()
        self._open_claims: set[SharedPublication] = set()
        self._uses = UseCounts(ledger.records)
        # What the ledger answers alone, it is asked directly.
        self.put_records, self.get_records = ledger.records.put, ledger.records.get
        self.list_records, self.set_pinned = ledger.records.page, ledger.records.set_pinned
        self.lookup, self.list_entries = ledger.entries.find, ledger.entries.listed
        self.miss_reason = ledger.entries.miss_reason
        self.tenants, self.usage = ledger.upkeep.tenants, ledger.upkeep.usage
        self.identity = ledger.upkeep.identity

    def note_uses(self, chunk_ids: Sequence[ChunkId], tenant: Tenant = DEFAULT_TENANT) -> None:
        self._uses.note(chunk_ids, tenant)

    def uses(self, chunk_ids: Sequence[ChunkId], tenant: Tenant = DEFAULT_TENANT) -> list[int]:
        return self._uses.of(chunk_ids, tenant)

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

    def renew(self, publications: Sequence[Publication]) -> list[Publication]:
        by_ttl: dict[float, list[tuple[Publication, Claim]]] = {}
        for publication in publications:
            claim = publication.claim
            if claim is not None:
                by_ttl.setdefault(claim.ttl_s, []).append((publication, claim))
        lost: list[Publication] = []
        for ttl_s, held in by_ttl.items():
            still = self.ledger.claims.renew([(claim.key, claim.nonce) for _, claim in held], ttl_s)
            gone = [publication for (publication, _), is_held in zip(held, still, strict=True) if not is_held]
            lost += [publication for publication in gone if publication.claim is not None]
        return lost

    def load(self, key: ChunkKey, token_ids: Sequence[int], buffers: Sequence[memoryview]) -> MissReason | None:
        return self.land(key, token_ids, Buffers(writable_views(buffers)))

    def land(self, key: ChunkKey, token_ids: Sequence[int], landing: Landing) -> MissReason | None:
        expected = Expected(key, token_ids)
        reason: MissReason | None = MissReason.LOAD_FAILED
        for _ in range(LOAD_ATTEMPTS_MAX):
            ticket = self.ledger.leases.begin_read(key)
            if isinstance(ticket, MissReason):
                return ticket
            try:
                settled, reason = self._read(ticket, expected, landing)
            finally:
                self.ledger.leases.end_read(ticket)
            if settled:
                break
        return reason

    def _read(self, ticket: ReadTicket, expected: Expected, landing: Landing) -> tuple[bool, MissReason | None]:
        """Whether the answer stands, and the answer; it does not when the entry changed under the reader."""
        try:
            self.blobs.read(ticket.blob, expected, landing)
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
        self._uses.flush()
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
        self._uses.flush()
        self.ledger.close()
        self.blobs.close()

    def _remove_garbage(self) -> None:
        blobs = self.ledger.upkeep.garbage()
        if blobs:
            self.ledger.upkeep.discard(self.blobs.remove(blobs))

    def _close_claim(self, publication: SharedPublication) -> None:
        with self._lock:
            self._open_claims.discard(publication)


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
            raise StoreError("the lease was released", "take a new one")
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
