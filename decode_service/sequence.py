"""A request inside the worker: what it is made of, where it stands, and what it tells its caller.

A sequence is touched by the device thread only, from ``submit`` to its last event.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from chunk_store.tenant import DEFAULT_TENANT, Tenant
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import RequestChunk
from engine.plan import PlacedChunk
from engine.sampling.params import Choice, SamplingParams
from engine.sampling.sampler import Sampler
from serving.errors import RequestError
from serving.trace.stages import StageClock


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


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
    tail_pages: tuple[int, ...] = ()
    tail_tokens: int = 0  # in the pool
    generated: list[int] = field(default_factory=list)
    done: bool = False
    deadline: float = math.inf  # by the monotonic clock, seconds; nobody waits for the answer after it
    cold: bool = False  # its KV was not in the store when it was looked for
    passed: int = 0  # how often another request was admitted before it
    tail_level: int | None = None  # not known before its first decode step
    _placed: tuple[int, tuple[PlacedChunk, ...]] = (-1, ())

    @property
    def tenant(self) -> Tenant:
        """Whose content it is about."""
        return self.composition.tenant

    @property
    def tail_tokens_max(self) -> int:
        """Slots that the tail can need: its prompt part and all of the answer but the last token."""
        return len(self.composition.tail) + self.params.max_tokens - 1

    @property
    def to_compute(self) -> RequestChunk | None:
        """The next chunk that is computed here, or has begun to be."""
        chunks = self.composition.chunks
        return next((c for c in chunks if c.computed is not None and c.computed < len(c.token_ids)), None)

    def placed(self, page_size: int, moves: int) -> tuple[PlacedChunk, ...]:
        """The chunks as a plan needs them; built anew only after runs have moved (``moves`` changed)."""
        if self._placed[0] != moves:
            chunks = (chunk for chunk in self.composition.chunks if chunk.visible)
            places = (PlacedChunk(c.held.first_slot(page_size), c.visible, c.offset) for c in chunks)
            self._placed = moves, tuple(places)
        return self._placed[1]


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
