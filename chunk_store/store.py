"""What a chunk store is: records of content, entries of KV, and the promises around them.

A store holds two things. A ``ChunkRecord`` is a chunk's content and what people say about it (name, tags,
pin, TTL). An entry is the KV of one chunk under one context, named by its ``ChunkKey``. Stores move bytes
and metadata; they do not know models, tensors or RPCs. All calls are synchronous, thread-safe and
batch-first; a caller that must not block runs them in a thread.

Life of an entry:  begin -> Claimed -> write -> commit | abort.   It is readable only after ``commit``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from chunk_store.entry import EntryHeader, EntryInfo, MissReason
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.landing import Landing
from chunk_store.record import NO_CONTENT, ChunkRecord, Content, RecordPage, RecordQuery
from chunk_store.tenant import DEFAULT_ONLY, DEFAULT_TENANT, NO_LIMITS, Tenant, TenantLimits, Tenants, TenantUsage


@dataclass(frozen=True)
class Stored:
    """Another writer has already committed this key: adopt it."""

    info: EntryInfo


@dataclass(frozen=True)
class Busy:
    """A live writer holds the claim on this key: wait about ``retry_after_s`` and call ``begin`` again."""

    retry_after_s: float


@dataclass(frozen=True)
class Claim:
    """The right to write ``key``, as the store knows it: by its ``nonce``. It ends ``ttl_s`` after its last renewal."""

    key: ChunkKey
    nonce: str
    ttl_s: float


class Publication(Protocol):
    """A claim on one key. Exactly one live claim exists per key across all processes of the store.

    Leaving the context without ``commit`` aborts. ``renew`` extends the claim while KV is being computed; of many
    claims ``ChunkStore.renew`` does that in one step.
    """

    @property
    def claim(self) -> Claim | None:
        """What is held, and has to be renewed; None once it is about to be committed or aborted."""

    def renew(self) -> None:
        """Extends the claim by its TTL. Raises ``ClaimLost``."""

    def write(self, header: EntryHeader, buffers: Sequence[memoryview], *, limits: TenantLimits = NO_LIMITS) -> None:
        """Stores header and data (planes in layout order); still unreadable.

        Raises ``StoreFull``, ``QuotaFull`` when the header's tenant would exceed ``limits``, ``ClaimLost``.
        """

    def commit(self) -> EntryInfo:
        """Makes the entry readable, atomically. Raises ``ClaimLost``; then nothing was published."""

    def abort(self) -> None:
        """Drops the claim and the data written. Harmless after ``commit`` or a second time."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Lease(Protocol):
    """Keeps entries from being evicted until released or expired."""

    def renew(self) -> None:
        """Extends the lease by its TTL. An expired lease is taken again for what still exists."""

    def release(self) -> None:
        """Ends the lease. Harmless a second time."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class DeleteReport:
    records: int
    entries: int
    nbytes: int


@dataclass(frozen=True)
class SweepReport:
    """What ``sweep`` removed: leftovers of dead writers, expired records, entries over capacity."""

    claims: int
    records: int
    entries: int
    nbytes: int


@dataclass(frozen=True)
class StoreStats:
    backend: str
    records: int
    records_max: int
    entries: int
    nbytes: int
    capacity_nbytes: int
    pinned_entries: int
    leased_entries: int
    evictions: int  # since the store was created
    quarantined: int  # since the store was created
    quarantine_entries: int = 0  # kept now; of ``nbytes``
    quarantine_nbytes: int = 0


class ChunkStore(Protocol):
    """One store, many processes. Every backend passes the same contract suite.

    Content has a tenant (``chunk_store.tenant``): a call that names tenants sees and changes theirs, and for a chunk
    of anybody else does what it does for a chunk that nobody has.
    """

    # -- content ------------------------------------------------------------------------------------
    def put_records(self, records: Sequence[ChunkRecord], *, limits: TenantLimits = NO_LIMITS) -> list[bool]:
        """Registers content under its records' tenants, idempotently; True where the tenant's chunk was new.

        For a known chunk the non-empty name, the union of tags, ``pinned`` and ``expires_at`` are updated; a transient
        record changes nothing of it but its last use. Transient records make room where there is none.

        A registry that is still full is shared: tenants that get new records here, and then have no more than their
        share of its maximum (divided by all tenants that have records, at least 1), still get in, up to twice the
        maximum in all. So what one tenant registers never refuses another one's first.
        Raises ``StoreFull`` when the registry holds its maximum, ``QuotaFull`` when a tenant would exceed ``limits``,
        and then registers none of ``records``.
        """

    def get_records(
        self, chunk_ids: Sequence[ChunkId], tenants: Tenants = DEFAULT_ONLY, *, known: Content = NO_CONTENT
    ) -> list[ChunkRecord | None]:
        """Records by id, each of the first of ``tenants`` that has it; None where unknown or expired.

        The token ids of what is ``known`` are not read; whether it is there, and all else, is.
        """

    def list_records(self, query: RecordQuery) -> RecordPage:
        """A page of records; stable under concurrent inserts. Raises ``ValueError`` for a foreign cursor."""

    def set_pinned(
        self,
        chunk_ids: Sequence[ChunkId],
        pinned: bool,
        tenant: Tenant = DEFAULT_TENANT,
        *,
        limits: TenantLimits = NO_LIMITS,
    ) -> list[bool]:
        """Pins or unpins a tenant's chunks (record and all their entries stay); True where the chunk is known.

        Raises ``QuotaFull`` when the tenant would exceed ``limits``, and then pins none.
        """

    def delete_chunks(self, chunk_ids: Sequence[ChunkId], tenants: Tenants = DEFAULT_ONLY) -> DeleteReport:
        """Removes records of ``tenants`` and their entries. Leased entries disappear when their last lease ends."""

    def delete_model(self, model: ModelIdentity) -> DeleteReport:
        """Removes all entries of one model; records stay."""

    def note_uses(self, chunk_ids: Sequence[ChunkId], tenant: Tenant = DEFAULT_TENANT) -> None:
        """Counts that ``tenant`` has used these, soon: a hint, which waits for nobody and may be lost."""

    def uses(self, chunk_ids: Sequence[ChunkId], tenant: Tenant = DEFAULT_TENANT) -> list[int]:
        """How often ``tenant`` has used each; what others did, also with what is shared, does not count.

        What other processes counted in the last second may be missing. 0 for what is not registered: with its record a
        chunk's uses are forgotten.
        """

    # -- KV -----------------------------------------------------------------------------------------
    def lookup(self, keys: Sequence[ChunkKey]) -> list[EntryInfo | None]:
        """Committed entries by key, in one round trip. Does not change eviction order."""

    def miss_reason(self, key: ChunkKey, chunk_id: ChunkId, model: ModelIdentity, tenant: Tenant) -> MissReason:
        """Why ``key`` is not stored: EVICTED, CONTEXT_DIFFERS (the tenant's own KV of the chunk) or NOT_STORED."""

    def begin(self, key: ChunkKey, *, ttl_s: float = 30.0) -> Publication | Stored | Busy:
        """Claims ``key`` for writing, so that it is computed once across all workers."""

    def renew(self, publications: Sequence[Publication]) -> list[Publication]:
        """Extends the claims of all of them, in one step for claims of one TTL; returns those whose claim is lost.

        One that ends meanwhile is not lost: whoever ends it is told how.
        """

    def load(self, key: ChunkKey, token_ids: Sequence[int], buffers: Sequence[memoryview]) -> MissReason | None:
        """Reads an entry into ``buffers`` (writable, planes in layout order) and verifies it.

        Returns None when every checksum and the token ids match, otherwise the reason; the content of
        ``buffers`` is then undefined and a bad entry has been quarantined; one in another format (FORMAT_DIFFERS)
        makes way for its replacement. Marks the entry as used.
        """

    def land(self, key: ChunkKey, token_ids: Sequence[int], landing: Landing) -> MissReason | None:
        """``load`` by way of a ``Landing``: each piece can be moved on as soon as it is verified."""

    def lease(self, keys: Sequence[ChunkKey], *, ttl_s: float = 30.0, wait_s: float | None = None) -> Lease:
        """Leases the entries that exist among ``keys`` against eviction and deletion.

        ``wait_s``: how long each call of the lease waits for other writers at most, in seconds; None is the backend's.
        """

    def list_entries(self, chunk_ids: Sequence[ChunkId] = (), tenants: Tenants = DEFAULT_ONLY) -> list[EntryInfo]:
        """Entries of ``tenants``, of the given chunks or all of them, next to be evicted first."""

    # -- upkeep -------------------------------------------------------------------------------------
    def sweep(self) -> SweepReport:
        """Removes leftovers of dead writers, expired records and leases, entries over capacity."""

    def stats(self) -> StoreStats:
        """Counts and sizes now, of everybody's content."""

    def tenants(self) -> list[Tenant]:
        """Every tenant that has something here, for the operator."""

    def usage(self, tenant: Tenant) -> TenantUsage:
        """Counts and sizes of one tenant's content now."""

    def close(self) -> None:
        """Frees handles. Claims of this store object are aborted; leases run out."""
