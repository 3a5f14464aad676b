"""A scheduler on a fake runner: page tables without memory, loads and launches that are only said to have happened."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from chunk_store.entry import MissReason
from chunk_store.key import ChunkId, ChunkKey, ChunkType
from chunk_store.tenant import DEFAULT_TENANT, Tenant
from decode_service.device.begun import sequences_of
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import ChunkOutcome, RequestChunk, Segment, Unpublished
from decode_service.scheduling.admission import Fill
from decode_service.scheduling.scheduler import Scheduler
from decode_service.scheduling.sequence import (
    AllReady,
    ChunkReady,
    Event,
    Finished,
    FinishReason,
    Sequence,
    State,
    Tokens,
)
from decode_service.scheduling.step_plan import Rows, StepPlan
from engine.kv.pages import PageTable
from engine.kv.resident import ResidentChunk, ResidentChunks
from engine.kv.source import KVSource
from engine.reuse import ReuseMode
from engine.run.room import StepRoom
from engine.sampling.params import Choice, SamplingParams, SamplingRequest
from engine.sight import EVERYTHING, Sight
from serving.errors import Unavailable
from serving.tenancy.places import TenantPlaces
from serving.tenancy.quotas import NO_QUOTAS, Quotas, TenantQuotas

PAGE, PIECE, EOS = 4, 16, 1


def request(
    name: str,
    chunks: Items[tuple[str, int]] = (),
    *,
    tail: int = 3,
    max_tokens: int = 4,
    tenant: str = DEFAULT_TENANT,
    exact: bool = False,
    **options: Any,
) -> Sequence:
    """A request over chunks of a name and a number of tokens; the same name is the same KV, if ``exact`` the same
    names in order. One without a tail is for its chunks alone."""
    segments = [Segment(ChunkId(key), ChunkType.CONTEXT, (5,) * tokens) for key, tokens in chunks]
    keys = ["/".join(key for key, _ in chunks[: n + 1] if exact) or chunks[n][0] for n in range(len(chunks))]
    made = tuple(
        RequestChunk(
            *(index, segment, ChunkKey(keys[index]), tuple(range(index)) if exact else (), 0, Tenant(tenant)),
            visible=len(segment.token_ids),
        )
        for index, segment in enumerate(segments)
    )
    query = Segment(ChunkId(""), ChunkType.QUERY, (6,) * tail)
    composition = Composition(made, query if tail else None, ReuseMode.INDEPENDENT, query.token_ids, Tenant(tenant))
    given: dict[str, Any] = {"salt": "", "bypass": False, **options}
    params = SamplingParams(max_tokens=max_tokens, min_tokens=given.pop("min_tokens", 0), seed=given.pop("seed", 0))
    sampling = SamplingRequest(params, composition.token_ids(), frozenset({EOS}))
    return Sequence(name, composition, sampling, deliver=lambda _: None, **given)


class FakeClaim:
    """Says what became of it, once."""

    def __init__(self) -> None:
        self.became = ""
        self.published: ResidentChunk | None = None

    def publish(self, chunk: ResidentChunk) -> None:
        assert chunk.ready and chunk.holders
        self._become("published")
        self.published = chunk

    def drop(self) -> None:
        self._become("dropped")

    def _become(self, what: str) -> None:
        assert not self.became
        self.became = what


@dataclass
class Forwards:
    """A runner before it runs anything: what it packs has ``rows`` rows in a step."""

    packs: bool = False
    rows: int = 16
    piece_tokens: int = PIECE
    long: int = 1 << 30  # chunks of more tokens are alone
    slots: int = 16

    def alone(self, tokens: int, *, chunk: bool) -> bool:
        return not self.packs or (chunk and tokens > self.long)

    def room(self, *, decoding: bool) -> StepRoom:
        return StepRoom(self.rows)


class Scheduled:
    """A scheduler with what it plans for: a pool's page table, loads that are under way, and a fake runner."""

    def __init__(
        self,
        *,
        chunk_pages: int = 24,
        tail_pages: int = 24,
        batch_max: int = 4,
        quotas: Quotas = NO_QUOTAS,
        forwards: Forwards | None = None,
        aside_pages: int = 0,
        sight: Sight = EVERYTHING,
    ) -> None:
        self.pool = PageTable(pages=chunk_pages + tail_pages, chunk_pages=chunk_pages, page_size=PAGE)
        self.residents = ResidentChunks(self.pool)  # type: ignore[arg-type]
        self.places = TenantPlaces(256, TenantQuotas(default=quotas))
        self.aside = PageTable(pages=aside_pages, chunk_pages=aside_pages, page_size=PAGE)
        self.scheduler = Scheduler(
            *(self.residents, self.places, forwards or Forwards()),
            eos_token_ids=frozenset({EOS}),
            batch_max=batch_max,
            aside=self.aside,
            sight=sight,
        )
        self.batch_max = batch_max
        self.loads: list[Fill] = []
        self.claims: list[FakeClaim] = []
        self.here: set[tuple[Fill, int]] = set()  # chunks that came before their load was over, to be computed
        self.sequences: list[Sequence] = []
        self.events: dict[Sequence, list[Event]] = {}
        self.ran: list[Rows] = []
        self._now = itertools.count(1)

    # -- events -------------------------------------------------------------------------------------
    def submit(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            if not sequence.for_chunks:
                self.places.take(sequence.tenant)
            self.sequences.append(sequence)
            self.scheduler.submit(sequence, next(self._now))

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan(next(self._now))
        self.loads += plan.loads
        return plan

    def came(self, fill: Fill, chunk: RequestChunk, how: bool | str = False) -> None:
        """One chunk of a load comes; see ``load``."""
        if how:
            self.here.add((fill, chunk.index))
        self.scheduler.came(fill, chunk, self._outcome(how))

    def load(self, fill: Fill, left: Items[bool | str] = ()) -> None:
        """A load ends well. Of its chunks that have not come those that are ``left`` are to be computed here, True
        for its own pool alone and "claim" to be published."""
        self.loads.remove(fill)
        hows = itertools.chain(left, itertools.repeat(False))
        outcomes = {chunk: self._outcome(how) for chunk, how in zip(self.awaited(fill), hows, strict=False)}
        self.scheduler.loaded(fill, outcomes, {"lookup": 1, "prefill": 2, "load": 3})

    def awaited(self, fill: Fill) -> list[RequestChunk]:
        """The chunks of a load that have not come."""
        return [chunk for chunk in fill.chunks if (fill, chunk.index) not in self.here]

    def _outcome(self, how: bool | str) -> ChunkOutcome:
        if not how:
            return ChunkOutcome(KVSource.STORE)
        if how == "claim":
            self.claims.append(FakeClaim())
            return ChunkOutcome(KVSource.COMPUTED, MissReason.NOT_STORED, claim=self.claims[-1])
        return ChunkOutcome(KVSource.COMPUTED, MissReason.NOT_STORED, Unpublished.STORE_FULL)

    def load_failed(self, fill: Fill) -> None:
        self.loads.remove(fill)
        self.scheduler.load_failed(fill, Unavailable("no prefill service"), next(self._now))

    def ask(self, fill: Fill) -> bool:
        """A load finds out that its KV has to be computed elsewhere; it ends if it may not wait for that."""
        may = self.scheduler.may_ask(fill)
        if not may:
            self.loads.remove(fill)
            self.scheduler.put_off(fill)
        return may

    def run(self, plan: StepPlan, token_id: int = 7) -> None:
        """The fake runner: whatever is planned has run, and gives ``token_id``."""
        for rows in plan.rows:
            self.ran.append(rows)
            check_context(rows)
            self.scheduler.ran([rows])
            if rows.decodes or rows.last_of_prompt:
                for sequence in sequences_of([rows]):
                    self.scheduler.token(sequence, Choice(token_id, None), next(self._now))

    def step(self, token_id: int = 7) -> StepPlan:
        plan = self.plan()
        self.run(plan, token_id)
        self.listen()
        return plan

    def abort(self, sequence: Sequence) -> None:
        self.scheduler.end(sequence.owner, sequence.request_id, FinishReason.ABORT, next(self._now))

    def fail(self, sequence: Sequence) -> None:
        self.scheduler.fail(sequence, Unavailable("broken"), next(self._now))

    def finish(self, steps_max: int = 2000) -> None:
        """Ends every load well and runs until nobody is left."""
        for _ in range(steps_max):
            for fill in list(self.loads):
                self.load(fill)
            if not self.step().rows and not self.loads and not self.scheduler.everyone:
                return
        raise AssertionError(f"requests are stuck: {[(s.request_id, s.state) for s in self.scheduler.everyone]}")

    def resident(self, name: str, tokens: int) -> None:
        """Puts a chunk into the pool."""
        chunk = self.residents.reserve(request("r", [(name, tokens)]).composition.chunks[0].key, tokens)
        chunk.ready = True
        self.residents.release(chunk)

    # -- what is seen -------------------------------------------------------------------------------
    def listen(self) -> None:
        for sequence, event in self.scheduler.take_events():
            self.events.setdefault(sequence, []).append(event)

    def ready(self, sequence: Sequence) -> list[int]:
        """The chunks that a request for chunks was told of."""
        self.listen()
        return [event.chunk.index for event in self.events.get(sequence, []) if isinstance(event, ChunkReady)]

    def states(self) -> str:
        """The first letters of all requests' states, in the order in which they came."""
        return "".join(sequence.state[0] for sequence in self.sequences)

    def check(self) -> None:
        """Every page has one owner, every hold one holder; every request stands in one place and is told one end."""
        self.residents.check_integrity()
        self.aside.check_integrity()
        asides = [sequence.aside.first for sequence in self.sequences if sequence.aside is not None]
        assert sorted(asides) == [run.first for run in self.aside.runs], "host memory is somebody's who waits"
        assert all(s.state in (State.WAITING, State.LOADING) for s in self.sequences if s.aside is not None)
        alive = [sequence for sequence in self.sequences if not sequence.done]
        assert sorted(map(id, self.scheduler.everyone)) == sorted(map(id, alive))
        tails = [page for sequence in self.sequences for page in sequence.own_pages]
        assert len(tails) == len(set(tails)) == self.pool.count()["tail"]
        held = Counter[int]()
        for sequence in self.sequences:
            admitted = sequence.state in (State.LOADING, State.PREFILLING, State.DECODING)
            chunks = [chunk.resident for chunk in sequence.composition.chunks if chunk.resident is not None]
            assert len(chunks) == (len(sequence.chunks_held) if admitted else 0)
            assert bool(sequence.tail_pages) == (sequence.state in (State.PREFILLING, State.DECODING))
            assert len(sequence.tail_pages) * PAGE >= sequence.tail_tokens or not sequence.tail_pages
            held.update(map(id, chunks))
            if sequence.fill is not None and sequence.fill not in self.loads:
                held.update(map(id, sequence.fill.chunks.values()))
        for fill in self.loads:
            held.update(map(id, fill.chunks.values()))
        assert {id(c): c.holders for c in self.residents._chunks.values() if c.holders} == held
        decoding = sum(sequence.state in (State.PREFILLING, State.DECODING) for sequence in alive)
        assert decoding <= self.batch_max
        waiting_for_chunks = [sequence for sequence in self.sequences if sequence.for_chunks]
        assert all(s.state in (State.WAITING, State.LOADING, State.ENDED) for s in waiting_for_chunks)
        for tenant in {sequence.tenant for sequence in self.sequences}:
            mine = [s.state for s in alive if s.tenant == tenant and not s.for_chunks]
            waiting = mine.count(State.WAITING)
            assert self.places.of(tenant) == (len(mine) - waiting, waiting)
        self.listen()
        self._check_claims()
        for sequence in self.sequences:
            told = self.events.get(sequence, [])
            if sequence.for_chunks:
                self._check_chunks(sequence, told)
                continue
            tokens = [event for event in told if isinstance(event, Tokens)]
            assert [choice.token_id for event in tokens for choice in event.choices] == sequence.generated
            assert len(told) - len(tokens) == sequence.done, "one end, once"
            assert not sequence.done or not isinstance(told[-1], Tokens), "nothing after the end"

    def _check_chunks(self, sequence: Sequence, told: list[Event]) -> None:
        """Each chunk is told once, all of them before the end that says so, and then one end."""
        ready = [event.chunk for event in told if isinstance(event, ChunkReady)]
        ends = [event for event in told if not isinstance(event, ChunkReady)]
        assert len(ready) == len(set(ready)) and len(ends) == sequence.done
        assert not ends or told[-1] is ends[0]
        if ends and isinstance(ends[0], AllReady):
            assert set(ready) == set(sequence.composition.chunks)
        assert not sequence.generated and sequence.slot < 0

    def _check_claims(self) -> None:
        """A claim is open while its chunk is being computed, then published or dropped, once."""
        fills = [sequence.fill for sequence in self.sequences if sequence.fill is not None]
        open_now = [claim for fill in fills for claim in fill.claims.values()]
        assert {id(claim) for claim in self.claims if not claim.became} == set(map(id, open_now))

    def check_idle(self) -> None:
        self.check()
        assert all(claim.became for claim in self.claims)
        assert not self.scheduler.everyone and self.residents.held == 0
        pages = self.pool.count()
        assert pages["tail"] == 0 and pages["chunk"] == sum(c.run.pages for c in self.residents._chunks.values())

    def reason(self, sequence: Sequence) -> FinishReason | None:
        self.listen()
        end = self.events[sequence][-1]
        return end.reason if isinstance(end, Finished) else None


def check_context(rows: Rows) -> None:
    """What rows attend to is in the pool when they are launched."""
    chunks, bypass = rows.sequence.composition.chunks, rows.sequence.bypass
    behind = rows.sequence.chunks_held if rows.chunk is None else [chunks[index] for index in rows.chunk.context]
    assert all(chunk.held.ready or (bypass and chunk.computed == len(chunk.token_ids)) for chunk in behind)
    assert rows.chunk is None or rows.chunk.computed == rows.first
