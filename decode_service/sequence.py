"""A request inside the worker: what it is made of, where it stands, and what it tells its caller.

A sequence is touched by the device thread only, from ``submit`` to its last event.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from chunk_store.entry import MissReason
from chunk_store.tenant import DEFAULT_TENANT, Tenant
from decode_service.prompt.composition import Composition
from engine.kv.resident import ResidentChunk
from engine.kv.source import KVSource
from engine.plan import PlacedChunk
from engine.sampling.params import Choice, SamplingParams
from engine.sampling.sampler import Sampler
from serving.errors import RequestError


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Unpublished(StrEnum):
    """Why KV that was computed for a request did not go to the store."""

    STORE_FULL = "store_full"
    STORE_UNAVAILABLE = "store_unavailable"


@dataclass(frozen=True)
class ChunkOutcome:
    """How one chunk of a composition came into the pool. ``unpublished``: it was computed here, for this pool only."""

    source: KVSource
    miss_reason: MissReason | None = None
    unpublished: Unpublished | None = None


@dataclass(frozen=True)
class Tokens:
    """Newly generated tokens."""

    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Finished:
    """The last event of an answer."""

    reason: FinishReason


@dataclass(frozen=True)
class Failed:
    """The last event of a request that could not be answered."""

    error: RequestError


Event = Tokens | Finished | Failed


@dataclass
class StageClock:
    """Monotonic nanoseconds at which a request passed its stages; 0 where it has not."""

    arrived: int = field(default_factory=time.monotonic_ns)
    submitted: int = 0
    admitted: int = 0
    filled: int = 0
    first_token: int = 0
    finished: int = 0
    lookup_ns: int = 0
    prefill_ns: int = 0
    load_ns: int = 0
    tokenize_ns: int = 0


@dataclass(eq=False)
class Sequence:
    """One request. ``deliver`` is called with its events, in order, from the device thread."""

    request_id: str
    composition: Composition
    params: SamplingParams
    sampler: Sampler
    salt: str
    bypass: bool
    deliver: Callable[[list[Event]], None]
    owner: Tenant = DEFAULT_TENANT  # of the request and its id, which is the owner's own among many
    clock: StageClock = field(default_factory=StageClock)
    chunks: list[ResidentChunk] = field(default_factory=list)
    outcomes: list[ChunkOutcome] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    tail_pages: tuple[int, ...] = ()
    tail_tokens: int = 0  # in the pool
    generated: list[int] = field(default_factory=list)
    done: bool = False
    deadline: float = math.inf  # by the monotonic clock, seconds; nobody waits for the answer after it
    cold: bool = False  # its KV was not in the store when it was looked for
    passed: int = 0  # how often another request was admitted before it
    tail_level: int = 0
    _placed: tuple[int, tuple[PlacedChunk, ...]] = (-1, ())

    @property
    def tenant(self) -> Tenant:
        """Whose content it is about."""
        return self.composition.tenant

    @property
    def tail_tokens_max(self) -> int:
        """Slots that the tail can need: its prompt part and all of the answer but the last token."""
        return len(self.composition.tail) + self.params.max_tokens - 1

    def placed(self, page_size: int, moves: int) -> tuple[PlacedChunk, ...]:
        """The chunks as a plan needs them; built anew only after runs have moved (``moves`` changed)."""
        if self._placed[0] != moves:
            chunks = zip(self.chunks, self.composition.chunks, strict=True)
            places = (
                PlacedChunk(resident.first_slot(page_size), self.composition.visible(index), keyed.offset)
                for index, (resident, keyed) in enumerate(chunks)
            )
            self._placed = moves, tuple(place for place in places if place.tokens)
        return self._placed[1]

    def cached_tokens(self, index: int) -> int:
        """Tokens of part ``index`` whose KV was reused."""
        if index >= len(self.composition.chunks) or self.outcomes[index].source is KVSource.COMPUTED:
            return 0
        return self.composition.visible(index)


@dataclass(frozen=True)
class Load:
    """What the worker is doing now. ``pages`` by owner: free, chunk, tail."""

    running: int
    waiting: int
    chunks_resident: int
    pages: dict[str, int]

    @property
    def usage(self) -> float:
        """Share of the pool's pages in use, 0 to 1."""
        return 1.0 - self.pages["free"] / sum(self.pages.values())
