"""The rules of a store: which entries exist, who writes, who reads, what goes first. No data passes here.

A ledger is the metadata half of a store, shared by every process; each call is one atomic step. It has five sides, one
for each thing that it knows of: records, entries, claims, leases, and the upkeep of them all. Blobs are the data half
(``blobs.py``). A ledger never touches a blob: what must be removed it hands out by name and remembers as *garbage*
until ``discard`` says that the bytes are gone, so a process that dies in between leaks nothing.

Space: entries, reservations of writers and garbage all count toward capacity.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from chunk_store.blobs import Quarantined
from chunk_store.entry import EntryHeader, EntryInfo, MissReason
from chunk_store.errors import ClaimLost
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.limits import Space, StoreLimits
from chunk_store.record import NO_CONTENT, ChunkRecord, Content, RecordPage, RecordQuery
from chunk_store.store import Busy, DeleteReport, Stored, StoreStats, SweepReport
from chunk_store.tenant import DEFAULT_ONLY, DEFAULT_TENANT, NO_LIMITS, Tenant, TenantLimits, Tenants, TenantUsage
from chunk_store.uses import Uses

TOMBSTONES_MAX = 65_536
IDENTITY_BITS = 63  # of a store's name; both kinds of ledger keep it as a signed number
BUSY_RETRY_S = 0.05
WRITE_TTL_S = 30.0  # how long writing one entry may take from its reservation on

_NAME = re.compile(r"[0-9a-f]{64}")


def check_key(key: ChunkKey) -> None:
    """Raises ``ValueError`` unless ``key`` is 64 lower-case hexadecimal digits (it names files)."""
    if not _NAME.fullmatch(key):
        raise ValueError(f"key: {key!r} is not 64 lower-case hexadecimal digits; make it with chunk_key()")


def blob_name(key: ChunkKey, nonce: str) -> str:
    """The blob that the claim ``nonce`` on ``key`` writes."""
    return f"{key}.{nonce}"


def claim_lost(key: ChunkKey) -> ClaimLost:
    """For who has not renewed the claim on ``key`` in time."""
    return ClaimLost(f"the claim on {key} expired and was taken or swept", "begin again")


def key_of(blob: str) -> ChunkKey:
    """The key whose blob this is."""
    return ChunkKey(blob.partition(".")[0])


@dataclass(frozen=True)
class ReadTicket:
    """The committed blob of a key, protected from removal until ``end_read`` where removal would hurt a reader."""

    key: ChunkKey
    blob: str
    token: str = ""


@dataclass(frozen=True)
class Placed:
    """An entry as the ledger knows it, for upkeep."""

    key: ChunkKey
    blob: str
    stored_nbytes: int


class Records(Protocol):
    """Content; ``ChunkStore`` says what each call promises."""

    def put(self, records: Sequence[ChunkRecord], *, limits: TenantLimits = NO_LIMITS) -> list[bool]: ...

    def get(
        self, chunk_ids: Sequence[ChunkId], tenants: Tenants = DEFAULT_ONLY, *, known: Content = NO_CONTENT
    ) -> list[ChunkRecord | None]: ...

    def page(self, query: RecordQuery) -> RecordPage: ...

    def set_pinned(
        self,
        chunk_ids: Sequence[ChunkId],
        pinned: bool,
        tenant: Tenant = DEFAULT_TENANT,
        *,
        limits: TenantLimits = NO_LIMITS,
    ) -> list[bool]: ...

    def delete(self, chunk_ids: Sequence[ChunkId], tenants: Tenants = DEFAULT_ONLY) -> DeleteReport: ...

    def add_uses(self, uses: Uses) -> None:
        """Adds to what is kept with the record that was used. Does not wait long for other writers."""

    def uses(self, chunk_ids: Sequence[ChunkId], tenant: Tenant) -> list[int]: ...


class Entries(Protocol):
    """Committed entries and the blobs they are in."""

    def find(self, keys: Sequence[ChunkKey]) -> list[EntryInfo | None]: ...

    def listed(self, chunk_ids: Sequence[ChunkId] = (), tenants: Tenants = DEFAULT_ONLY) -> list[EntryInfo]: ...

    def miss_reason(self, key: ChunkKey, chunk_id: ChunkId, model: ModelIdentity, tenant: Tenant) -> MissReason: ...

    def placed(self) -> list[Placed]:
        """Every entry with its blob."""

    def locate(self, key: ChunkKey) -> Placed | None:
        """One entry with its blob; does not count as use."""

    def adopt(self, header: EntryHeader, blob: str, stored_nbytes: int) -> bool:
        """Makes an entry of a complete blob found without one; False if the key has an entry or a live claim."""

    def forget(self, key: ChunkKey, blob: str, quarantined: bool) -> bool:
        """Drops an entry whose ``blob`` is lost or bad; False if ``blob`` is no longer that entry's.

        A bad one (``quarantined``) is counted; where the blobs keep it, it takes space until it is old or in the way.
        """

    def delete_model(self, model: ModelIdentity) -> DeleteReport: ...


class Claims(Protocol):
    """Who may write which key, and the space for it."""

    def claim(self, key: ChunkKey, nonce: str, ttl_s: float) -> Stored | Busy | None:
        """None where the caller holds the only live claim on ``key`` now."""

    def renew(self, held: Sequence[tuple[ChunkKey, str]], ttl_s: float) -> list[bool]:
        """Extends claims, each a key and a nonce, in one step; whether each is held still."""

    def reserve(self, key: ChunkKey, nonce: str, space: Space, removed: Sequence[str]) -> list[str]:
        """Reserves space for a claim's blob. Empty when reserved; otherwise the garbage to remove first.

        ``removed`` is the garbage that is gone since the last call. Raises ``StoreFull``, ``QuotaFull``, ``ClaimLost``.
        """

    def evict(self, nbytes: int) -> list[str]:
        """Evicts about ``nbytes`` whatever the capacity (the medium is full); returns the garbage to remove."""

    def commit(self, key: ChunkKey, nonce: str, header: EntryHeader) -> EntryInfo:
        """Turns a claim with a written blob into an entry. Raises ``ClaimLost``."""

    def drop(self, key: ChunkKey, nonce: str) -> bool:
        """Ends a claim; its blob becomes garbage. False when it was lost or committed before."""

    def unfinished(self) -> list[str]:
        """Blobs that live claims may be writing."""


class Leases(Protocol):
    """What keeps entries from eviction: holds for a time, and readers while they read."""

    def hold(self, lease: str, keys: Sequence[ChunkKey], ttl_s: float, wait_s: float | None = None) -> None:
        """Leases the entries that exist among ``keys`` for ``ttl_s`` from now; see ``ChunkStore.lease``."""

    def end(self, lease: str, keys: Sequence[ChunkKey], wait_s: float | None = None) -> None:
        """Ends a lease on ``keys``."""

    def begin_read(self, key: ChunkKey) -> ReadTicket | MissReason:
        """The blob to read, marked as used; NOT_STORED or EVICTED without one."""

    def end_read(self, ticket: ReadTicket) -> None:
        """Ends the protection of ``begin_read``."""


class Upkeep(Protocol):
    """What is removed, counted and audited, of everybody's content."""

    def sweep(self, quarantined: Sequence[Quarantined] = ()) -> SweepReport:
        """See ``ChunkStore``; ``quarantined`` is what the blobs keep of bad data."""

    def garbage(self) -> list[str]:
        """Blobs that no entry or claim refers to any more."""

    def discard(self, blobs: Sequence[str]) -> None:
        """Notes that ``blobs`` are gone from the medium."""

    def audit(self) -> list[str]:
        """What is wrong with the ledger itself, one sentence each; empty when all of it agrees."""

    def recount(self) -> None:
        """Sets counts and sizes from the rows they count."""

    def identity(self) -> str:
        """Names this store and no other, in every process that uses it: drawn when it is first asked for."""

    def set_limits(self, limits: StoreLimits) -> None:
        """Changes the store's limits, for every process that uses it."""

    def stats(self, backend: str) -> StoreStats: ...

    def tenants(self) -> list[Tenant]: ...

    def usage(self, tenant: Tenant) -> TenantUsage: ...


@dataclass(frozen=True)
class Ledger:
    """Metadata of one store. Thread-safe. Every call may raise ``StoreUnavailable``."""

    records: Records
    entries: Entries
    claims: Claims
    leases: Leases
    upkeep: Upkeep
    close: Callable[[], None]
