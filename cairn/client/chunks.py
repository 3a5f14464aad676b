"""Chunks and the store that holds them, as a client knows them."""

from __future__ import annotations

from dataclasses import dataclass

from cairn.client.reports import Timings

CHUNK_TYPES = ("system_prompt", "context", "code", "rag_result", "query", "turn")
LIST_ORDERS = ("created", "last_used", "name")


@dataclass(frozen=True)
class ChunkRef:
    """A registered chunk, named by its id."""

    id: str


@dataclass(frozen=True)
class Chunk(ChunkRef):
    """What ``prefill`` did. ``outcome`` is ``"computed"`` or ``"already_stored"``; the token counts include
    context that had to be computed or was found. ``durable``: the KV is in the store now; else it is being written."""

    key: str
    tokens: int
    outcome: str
    computed_tokens: int
    reused_tokens: int
    timings: Timings
    name: str = ""
    type: str = ""
    newly_registered: bool = False
    model_identity: str = ""
    durable: bool = True


@dataclass(frozen=True)
class StoredChunk(ChunkRef):
    """A registered chunk as the prefill service lists it. ``expires_unix_s`` None: it has no TTL."""

    type: str
    name: str
    tags: tuple[str, ...]
    tokens: int
    pinned: bool
    created_unix_s: float
    last_used_unix_s: float
    expires_unix_s: float | None
    kv_entries: int
    kv_bytes: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    shared: bool = False  # published for every tenant


@dataclass(frozen=True)
class Deleted:
    """What deleting a chunk freed."""

    kv_entries: int
    kv_bytes: int


@dataclass(frozen=True)
class StoreStats:
    """What the chunk store holds and how much it may hold (0: no limit)."""

    backend: str
    chunks: int
    chunks_max: int
    kv_entries: int
    kv_bytes: int
    capacity_bytes: int
    pinned_entries: int
    leased_entries: int
    evictions: int
    quarantined: int
    model_identity: str
    model_name: str
