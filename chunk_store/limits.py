"""How much a store holds: limits that every process shares, and what is said where they are reached."""

from __future__ import annotations

from dataclasses import dataclass

from chunk_store.errors import QuotaFull, StoreFull
from chunk_store.tenant import DEFAULT_TENANT, Tenant

CAPACITY_NBYTES_DEFAULT = 16 * 2**30
RECORDS_MAX_DEFAULT = 100_000
QUARANTINE_S_DEFAULT = 7 * 86_400  # how long bad data is kept
QUARANTINE_MAX = 64  # and how many of it
_FREED_BY = {
    "chunks": "delete chunks (DeleteChunk)",
    "pins": "unpin chunks (UnpinChunk)",
    "bytes": "delete chunks with their KV (DeleteChunk)",
}


@dataclass(frozen=True)
class StoreLimits:
    """Properties of a store, shared by every process: bytes with headers, records, and how long bad data is kept.

    None keeps what the store has, or the default where it is new. Raises ``ValueError`` that names the limit.
    """

    capacity_nbytes: int | None = None
    records_max: int | None = None
    quarantine_s: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("capacity_nbytes", 1), ("records_max", 1), ("quarantine_s", 0)):
            if name in self.given and self.given[name] < least:
                raise ValueError(f"{name}: {self.given[name]} is less than {least}")

    @property
    def given(self) -> dict[str, int]:
        """Those that are set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def of_new_store(self) -> dict[str, int]:
        """Capacity and number of records where the store has none yet."""
        return {"capacity_nbytes": CAPACITY_NBYTES_DEFAULT, "records_max": RECORDS_MAX_DEFAULT, **self.given}


@dataclass(frozen=True)
class Space:
    """Bytes that a blob will take, whose it is, and how many the tenant may have in all (None: any number)."""

    nbytes: int
    tenant: Tenant = DEFAULT_TENANT
    tenant_nbytes_max: int | None = None


def no_room(nbytes: int) -> StoreFull:
    """What a writer is told where nothing more can be evicted."""
    problem = f"no room for {nbytes} bytes: the rest is pinned, leased or being written"
    return StoreFull(problem, "unpin or delete chunks, or raise the store's capacity")


def too_large(nbytes: int, capacity_nbytes: int) -> StoreFull:
    problem = f"an entry of {nbytes} bytes is larger than the store's capacity of {capacity_nbytes}"
    return StoreFull(problem, "raise the store's capacity")


def quota_full(quota: str, limit: int) -> QuotaFull:
    """What a tenant is told whose ``quota`` (chunks, pins, bytes) is full."""
    problem = f"quota {quota}: the tenant may have {limit}, and this would be more"
    return QuotaFull(problem, f"{_FREED_BY[quota]} or have the quota raised")
