"""One document of one request: what it holds, its key and place, and what has come of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from chunk_store.entry import MissReason
from chunk_store.key import ChunkId, ChunkKey, ChunkType
from chunk_store.tenant import Tenant
from engine.kv.resident import ResidentChunk
from engine.kv.source import KVSource


@dataclass(frozen=True)
class Segment:
    """One place of a prompt, with its tokens. ``chunk_id`` is "" for an inline query.

    ``shared``: it is everybody's content.
    """

    chunk_id: ChunkId
    type: ChunkType
    token_ids: tuple[int, ...]
    name: str = ""
    named_by_id: bool = False
    shared: bool = False


class Claim(Protocol):
    """The right to publish a chunk's KV, held by whoever computes it here. Hands itself on, and blocks nobody."""

    def publish(self, chunk: ResidentChunk) -> None:
        """Its rows were launched: to be called in the device thread, while the chunk is held."""

    def drop(self) -> None:
        """Nobody computes it."""


class Unpublished(StrEnum):
    """Why KV that was computed for a request did not go to the store."""

    STORE_FULL = "store_full"
    STORE_UNAVAILABLE = "store_unavailable"


@dataclass(frozen=True)
class ChunkOutcome:
    """How a chunk came into the pool.

    With a ``claim`` it is computed here and published; ``unpublished`` is why it is computed for this pool only.
    """

    source: KVSource
    miss_reason: MissReason | None = None
    unpublished: Unpublished | None = None
    claim: Claim | None = None

    @property
    def here(self) -> bool:
        """Whether it is computed here."""
        return self.unpublished is not None or self.claim is not None


@dataclass(eq=False)
class RequestChunk:
    """A segment that has KV of its own.

    The first half is settled when the prompt is composed: its ``key``, the indices of the chunks it was computed
    under, how far from that place it stands now, whose KV it is, how many of its tokens are read from the pool, and
    its index among the ``given`` segments (None: the same). The second half belongs to whoever runs the request: where
    the KV came from (None: not known yet), the pages it lies in, how many tokens of it have been computed here (None:
    it is not computed here), and the level of the cascade in which it is read.
    """

    index: int
    segment: Segment
    key: ChunkKey
    context: tuple[int, ...]
    offset: int
    tenant: Tenant
    visible: int
    given: int | None = None
    outcome: ChunkOutcome | None = None
    resident: ResidentChunk | None = None
    computed: int | None = None
    level: int = 0

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.segment.token_ids

    @property
    def given_index(self) -> int:
        """Where it stands in the request that its caller sent."""
        return self.index if self.given is None else self.given

    @property
    def held(self) -> ResidentChunk:
        """The pages of an admitted request's chunk."""
        assert self.resident is not None
        return self.resident

    @property
    def cached_tokens(self) -> int:
        """Tokens whose KV is reused."""
        return 0 if self.outcome is None or self.outcome.source is KVSource.COMPUTED else self.visible
