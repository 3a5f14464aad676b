"""The stored KV of one key, as its header and the store's index describe it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.layout import KVLayout
from chunk_store.tenant import DEFAULT_TENANT, Tenant


class MissReason(StrEnum):
    """Why KV that a request wanted was not served from the store."""

    NOT_STORED = "not_stored"
    CONTEXT_DIFFERS = "context_differs"
    EVICTED = "evicted"
    LOAD_FAILED = "load_failed"
    VERIFY_FAILED = "verify_failed"
    FORMAT_DIFFERS = "format_differs"  # stored by older or newer software; it is computed and stored again


@dataclass(frozen=True)
class EntryHeader:
    """What describes an entry; stored with its data and compared when it is loaded.

    ``salt_digest`` is the tenant (``chunk_store.tenant``): a digest of the salt, "" without one.
    """

    key: ChunkKey
    chunk_id: ChunkId
    model: ModelIdentity
    layout: KVLayout
    token_ids: tuple[int, ...]
    context: tuple[ChunkKey, ...]
    salt_digest: str = ""

    @property
    def tenant(self) -> Tenant:
        return Tenant(self.salt_digest)

    @property
    def nbytes(self) -> int:
        """Bytes of KV data."""
        return self.layout.nbytes(len(self.token_ids))


@dataclass(frozen=True)
class EntryInfo:
    """A committed entry as ``lookup`` and ``list_entries`` see it."""

    key: ChunkKey
    chunk_id: ChunkId
    model: ModelIdentity
    tokens: int
    nbytes: int  # KV data, without header
    created_at: float
    last_used_at: float
    tenant: Tenant = DEFAULT_TENANT
