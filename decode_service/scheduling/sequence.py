"""A request inside the worker: what it is made of, where it stands, and what it tells its caller.

The scheduler alone changes a sequence, in the device thread, from ``submit`` to its last event.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING

from chunk_store.tenant import DEFAULT_TENANT, Tenant
from decode_service.prompt.composition import Composition
from engine.plan import CascadePlan, PlacedChunk
from engine.sampling.params import Choice, SamplingParams, SamplingRequest
from serving.errors import RequestError
from serving.trace.stages import StageClock

if TYPE_CHECKING:  # a scheduler hands them on
    from decode_service.prompt.request_chunk import ChunkOutcome, RequestChunk
    from decode_service.prompt.scores import PromptScores
    from decode_service.scheduling.admission import Fill
    from decode_service.scheduling.kept import Keep
    from engine.kv.pages import PageRun
    from text.grammar.matcher import Matcher


class State(StrEnum):
    """Where a request stands; ``standing.py`` draws the way from one state to another."""

    WAITING = "waiting"  # to be admitted, for the first time or again; it holds nothing of the pool
    LOADING = "loading"  # its chunks have pages; it waits for KV, a place to decode or pages of its own
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
    scores: PromptScores | None = None  # of its prompt's tokens, if they are wanted
    prompt: object = field(default_factory=object)  # the same one for all answers of a request
    deadline: float = math.inf  # by the monotonic clock, seconds; nobody waits for the answer after it
    state: State = State.WAITING
    fill: Fill | None = None  # what its admission brings into the pool
    slot: int = -1  # of the runner's, in which its tokens are drawn; from PREFILLING to its end
    tail_pages: tuple[int, ...] = ()
    pages_gone: int = 0  # the first ones of these, that no row to come sees: the pool's scratch page stands for them
    chunks_gone: int = 0  # its first chunks, that no row to come sees: it holds them no more
    tail_tokens: int = 0  # in the pool, or gone
    generated: list[int] = field(default_factory=list)
    cold: bool = False  # its KV was not in the store when it was looked for
    passed: int = 0  # how often another request was admitted before it
    tail_level: int | None = None  # not known before its first decode step
    told: set[RequestChunk] = field(default_factory=set)  # the chunks that a request for chunks was told of
    keep: Keep | None = None  # its query and answer become a chunk
    grammar: Matcher | None = None  # that its answer follows, behind all of ``generated``; none once it has ended
    priority: int = 0  # 0..9, among its tenant's requests; the higher goes first and gives way last
    start_by: int = 0  # by the monotonic clock, nanoseconds; it fails if its query is not begun by then. 0: no limit
    preemptions: int = 0  # how often it gave up its pages
    resumed: int = 0  # tokens of the answer that were there when it went on; they are known, and not drawn again
    awaited: int = 0  # tokens of the answer that must have been read before it may go on
    aside: PageRun | None = None  # of host memory, where its tail is meanwhile
    _placed: tuple[tuple[int, int], tuple[PlacedChunk, ...]] = ((-1, 0), ())

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
    def own_pages(self) -> tuple[int, ...]:
        """The pages that its tail has."""
        return self.tail_pages[self.pages_gone :]

    @property
    def chunks_held(self) -> tuple[RequestChunk, ...]:
        """The chunks that it needs, and holds while it is admitted."""
        return self.composition.chunks[self.chunks_gone :]

    @property
    def next_position(self) -> int:
        """Where the next row of its tail stands: no earlier one comes before its pages are given up."""
        return self.composition.tail_start + self.tail_tokens

    @property
    def known_tokens(self) -> int:
        """Tokens of the tail that are computed before one is drawn: the query, and behind it, of an answer that goes
        on, all tokens but the last, whose row draws the next."""
        return len(self.composition.tail) + max(self.resumed - 1, 0)

    def tail_token_ids(self, first: int, count: int) -> tuple[int, ...]:
        """Known tokens of the tail."""
        tail, behind = self.composition.tail, max(0, first + count - len(self.composition.tail))
        answer = self.generated[max(0, first - len(tail)) : behind]
        return (*tail[first : first + count], *answer)

    def note_outcome(self, chunk: RequestChunk, outcome: ChunkOutcome) -> None:
        """How a chunk came into the pool; not how it came again for an answer that goes on."""
        if not self.preemptions:
            chunk.outcome = outcome

    def give_up(self, *, aside: bool) -> None:
        """Its pages, its place and its chunks are others' now; ``aside``: its tail's bytes are kept."""
        self.preemptions += 1
        self.awaited = max(self.drawn, len(self.generated)) if self.tail_tokens >= self.known_tokens else self.awaited
        if not aside:
            self.tail_tokens = self.pages_gone = self.chunks_gone = 0
        self.slot = -1
        self._placed = (-1, 0), ()

    def go_on(self) -> None:
        """It has pages and a place, for the first time or again: what was generated is known now."""
        self.resumed = len(self.generated)

    @property
    def sampling_now(self) -> SamplingRequest:
        """How its tokens are drawn from here on."""
        return replace(self.sampling, generated=tuple(self.generated)) if self.generated else self.sampling

    @property
    def drawn(self) -> int:
        """Tokens of the answer that were drawn, or will be by what was launched."""
        return self.tail_tokens - len(self.composition.tail) + 1

    @property
    def may_draw_more(self) -> bool:
        """Whether all of its prompt was launched, and there are tokens to draw beside those that were launched.

        One that is kept has a row of its last token, too: what that draws is dropped, as behind any token that ends.
        """
        all_known = self.tail_tokens >= self.known_tokens
        return all_known and 0 < self.drawn < self.params.max_tokens + (self.keep is not None)

    @property
    def tail_tokens_next(self) -> int:
        """Slots that its tail needs when it is begun, or goes on: all that is known and the first token drawn."""
        known = max(self.known_tokens, len(self.composition.tail) + max(len(self.generated), self.awaited) - 1)
        return min(known + 1, self.tail_tokens_max)

    @property
    def tail_tokens_max(self) -> int:
        """Slots that the tail can need: its prompt part, and all of the answer but a last token that nobody keeps."""
        if self.for_chunks:
            return 0
        return len(self.composition.tail) + self.params.max_tokens - (self.keep is None)

    def placed(self, page_size: int, moves: int) -> tuple[PlacedChunk, ...]:
        """The chunks that its rows may see, as a plan needs them; built anew only after runs have moved (``moves``
        changed), or after some have gone."""
        made_of = moves, self.chunks_gone
        if self._placed[0] != made_of:
            held = zip(self.composition.starts, self.composition.chunks, strict=True)
            places = (
                PlacedChunk(chunk.held.first_slot(page_size), chunk.visible, chunk.offset, start)
                for start, chunk in islice(held, self.chunks_gone, None)
                if chunk.visible
            )
            self._placed = made_of, tuple(places)
        return self._placed[1]

    def note_levels(self, plan: CascadePlan, row: int, page_size: int) -> None:
        """At its first decode step a sequence learns in which level each chunk is read."""
        self.tail_level = len(plan.levels)
        for chunk in self.composition.chunks:
            chunk.level = self.tail_level
        for chunk in self.chunks_held:
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
