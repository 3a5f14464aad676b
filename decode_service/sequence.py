"""A request inside the worker: what it is made of, where it stands, and what it tells its caller.

The scheduler alone changes a sequence, in the device thread, from ``submit`` to its last event.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from chunk_store.tenant import DEFAULT_TENANT, Tenant
from decode_service.prompt.composition import Composition
from engine.plan import CascadePlan, PlacedChunk
from engine.sampling.params import Choice, SamplingParams, SamplingRequest
from serving.errors import RequestError
from serving.trace.stages import StageClock

if TYPE_CHECKING:  # a scheduler hands them on
    from decode_service.admission import Fill
    from decode_service.kept import Keep
    from decode_service.prompt.request_chunk import RequestChunk
    from text.grammar import Matcher


class State(StrEnum):
    """Where a request stands; ``scheduler.py`` draws the way from one state to another."""

    WAITING = "waiting"  # to be admitted; it holds nothing
    LOADING = "loading"  # it has all its pages, and waits for KV or for a place to decode
    PREFILLING = "prefilling"  # all KV is there but what it computes itself
    DECODING = "decoding"  # it has its first token
    ENDED = "ended"


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


@dataclass(frozen=True)
class ChunkReady:
    """A chunk of a request for chunks can be read, whether it was here, was loaded or is computed here."""

    chunk: RequestChunk


@dataclass(frozen=True)
class AllReady:
    """The last event of a request for chunks: all of them can be read."""


Event = Tokens | Finished | Failed | ChunkReady | AllReady


@dataclass(eq=False)
class Sequence:
    """One request, or one answer of a request for several: they bear its id, and the first one counts its prompt.
    ``deliver`` is called with its events, in order, by ``hand_out``.

    A request *for chunks* has a composition without a tail. It ends when its chunks are in the pool: it never draws,
    and takes no place to decode.
    """

    request_id: str
    composition: Composition
    sampling: SamplingRequest
    salt: str
    bypass: bool
    deliver: Callable[[list[Event]], None]
    owner: Tenant = DEFAULT_TENANT  # of the request and its id, which is the owner's own among many
    clock: StageClock = field(default_factory=StageClock)
    answer: int = 0  # which answer of its request
    prompt: object = field(default_factory=object)  # the same one for all answers of a request
    deadline: float = math.inf  # by the monotonic clock, seconds; nobody waits for the answer after it
    state: State = State.WAITING
    fill: Fill | None = None  # what its admission brings into the pool
    slot: int = -1  # of the runner's, in which its tokens are drawn; from PREFILLING to its end
    tail_pages: tuple[int, ...] = ()
    tail_tokens: int = 0  # in the pool
    generated: list[int] = field(default_factory=list)
    cold: bool = False  # its KV was not in the store when it was looked for
    passed: int = 0  # how often another request was admitted before it
    tail_level: int | None = None  # not known before its first decode step
    told: set[RequestChunk] = field(default_factory=set)  # the chunks that a request for chunks was told of
    keep: Keep | None = None  # its query and answer become a chunk
    grammar: Matcher | None = None  # that its answer follows, behind all of ``generated``; none once it has ended
    _placed: tuple[int, tuple[PlacedChunk, ...]] = (-1, ())

    @property
    def for_chunks(self) -> bool:
        """Whether chunks are all that is asked for."""
        return not self.composition.tail

    @property
    def params(self) -> SamplingParams:
        return self.sampling.params

    @property
    def tenant(self) -> Tenant:
        """Whose content it is about."""
        return self.composition.tenant

    @property
    def done(self) -> bool:
        return self.state is State.ENDED

    @property
    def drawn(self) -> int:
        """Tokens of the answer that were drawn, or will be by what was launched."""
        return self.tail_tokens - len(self.composition.tail) + 1

    @property
    def may_draw_more(self) -> bool:
        """Whether all of its prompt was launched, and there are tokens to draw beside those that were launched.

        One that is kept has a row of its last token, too: what that draws is dropped, as behind any token that ends.
        """
        return 0 < self.drawn < self.params.max_tokens + (self.keep is not None)

    @property
    def tail_tokens_max(self) -> int:
        """Slots that the tail can need: its prompt part, and all of the answer but a last token that nobody keeps."""
        if self.for_chunks:
            return 0
        return len(self.composition.tail) + self.params.max_tokens - (self.keep is None)

    def placed(self, page_size: int, moves: int) -> tuple[PlacedChunk, ...]:
        """The chunks as a plan needs them; built anew only after runs have moved (``moves`` changed)."""
        if self._placed[0] != moves:
            chunks = (chunk for chunk in self.composition.chunks if chunk.visible)
            places = (PlacedChunk(c.held.first_slot(page_size), c.visible, c.offset) for c in chunks)
            self._placed = moves, tuple(places)
        return self._placed[1]

    def note_levels(self, plan: CascadePlan, row: int, page_size: int) -> None:
        """At its first decode step a sequence learns in which level each chunk is read."""
        self.tail_level = len(plan.levels)
        for chunk in self.composition.chunks:
            chunk.level = plan.level_of(chunk.held.first_slot(page_size), row)


Deliveries = dict[Sequence, list[Event]]


def hand_out(deliveries: Deliveries) -> None:
    """Tells each caller its own, in the thread that the callers' ``deliver`` is made for."""
    for sequence, events in deliveries.items():
        sequence.deliver(events)


@dataclass(frozen=True)
class Occupancy:
    """What the worker is doing now. ``pages`` by owner: free, chunk, tail."""

    running: int
    waiting: int
    chunks_resident: int
    pages: dict[str, int]

    @property
    def usage(self) -> float:
        """Share of the pool's pages in use, 0 to 1."""
        return 1.0 - self.pages["free"] / sum(self.pages.values())
