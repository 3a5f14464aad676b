"""A registered chunk as a store keeps it, and how records are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from chunk_store.key import ChunkId, ChunkType, TokenizerIdentity
from chunk_store.tenant import DEFAULT_ONLY, DEFAULT_TENANT, Tenant, Tenants


class RecordOrder(StrEnum):
    """Order of ``list_records``; LAST_USED is eviction order, the next to go first."""

    CREATED = "created"
    LAST_USED = "last_used"
    NAME = "name"


@dataclass(frozen=True)
class ChunkRecord:
    """A registered chunk of one tenant. Times are Unix seconds; ``expires_at`` None means no TTL.

    Two tenants that register the same content have two records under one chunk id, which know nothing of each other.
    What is ``transient`` only passed through a request: it makes room when the registry is full, least recently used
    first, unless it is pinned or leased. Registered again without that, it stays.
    """

    chunk_id: ChunkId
    tokenizer: TokenizerIdentity
    type: ChunkType
    token_ids: tuple[int, ...]
    name: str = ""
    tags: tuple[str, ...] = ()
    pinned: bool = False
    created_at: float = 0.0
    last_used_at: float = 0.0
    expires_at: float | None = None
    tenant: Tenant = DEFAULT_TENANT
    transient: bool = False


Content = Mapping[ChunkId, tuple[int, ...]]
"""Token ids by chunk id, as somebody has them already: they never change under their id."""

NO_CONTENT: Content = MappingProxyType({})


@dataclass(frozen=True)
class RecordQuery:
    """Filter and page of ``list_records``, over ``tenants``. ``cursor`` is a page's ``next_cursor``; "" starts."""

    type: ChunkType | None = None
    tag: str = ""
    name: str = ""
    order: RecordOrder = RecordOrder.CREATED
    limit: int = 100
    cursor: str = ""
    tenants: Tenants = DEFAULT_ONLY


@dataclass(frozen=True)
class RecordPage:
    records: tuple[ChunkRecord, ...]
    next_cursor: str  # "" on the last page
