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
from decode_service.admission import Fill
from decode_service.line import SHORT_PIECE, STEPS_A_PIECE
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import ChunkOutcome, RequestChunk, Segment, Unpublished
from decode_service.scheduler import Scheduler
from decode_service.sequence import Event, Finished, FinishReason, Sequence, State, Tokens
from decode_service.step_plan import Rows, StepPlan
from engine.kv.pages import PageTable
from engine.kv.resident import ResidentChunks
from engine.kv.source import KVSource
from engine.reuse import ReuseMode
from engine.run.room import StepRoom
from engine.sampling.params import Choice, SamplingParams, SamplingRequest
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
    **options: Any,
) -> Sequence:
    """A request over chunks of a name and a number of tokens; the same name is the same KV."""
    segments = [Segment(ChunkId(key), ChunkType.CONTEXT, (5,) * tokens) for key, tokens in chunks]
    made = tuple(
        RequestChunk(index, segment, ChunkKey(segment.chunk_id), (), 0, Tenant(tenant), len(segment.token_ids))
        for index, segment in enumerate(segments)
    )
    query = Segment(ChunkId(""), ChunkType.QUERY, (6,) * tail)
    composition = Composition(made, query, ReuseMode.INDEPENDENT, query.token_ids, Tenant(tenant))
    given: dict[str, Any] = {"salt": "", "bypass": False, **options}
    params = SamplingParams(max_tokens=max_tokens, min_tokens=given.pop("min_tokens", 0), seed=given.pop("seed", 0))
    sampling = SamplingRequest(params, composition.token_ids(), frozenset({EOS}))
    return Sequence(name, composition, sampling, deliver=lambda _: None, **given)


@dataclass
class Forwards:
    """A runner before it runs anything: what it packs has ``rows`` rows in a step."""

    packs: bool = False
    rows: int = 16
    piece_tokens: int = PIECE
    long: int = 1 << 30  # chunks of more tokens are alone

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
    ) -> None:
        self.pool = PageTable(pages=chunk_pages + tail_pages, chunk_pages=chunk_pages, page_size=PAGE)
        self.residents = ResidentChunks(self.pool)  # type: ignore[arg-type]
        self.places = TenantPlaces(256, TenantQuotas(default=quotas))
        self.scheduler = Scheduler(
            *(self.residents, self.places, forwards or Forwards()), eos_token_ids=frozenset({EOS}), batch_max=batch_max
        )
        self.batch_max = batch_max
        self.loads: list[Fill] = []
        self.sequences: list[Sequence] = []
        self.events: dict[Sequence, list[Event]] = {}
        self.ran: list[Rows] = []
        self._now = itertools.count(1)

    # -- events -------------------------------------------------------------------------------------
    def submit(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.places.take(sequence.tenant)
            self.sequences.append(sequence)
            self.scheduler.submit(sequence, next(self._now))

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan(next(self._now))
        self.loads += plan.loads
        return plan

    def load(self, fill: Fill, unpublished: Items[bool] = ()) -> None:
        """A load ends well; those of its chunks that are ``unpublished`` are left to be computed."""
        self.loads.remove(fill)
        outcomes = dict.fromkeys(fill.chunks, ChunkOutcome(KVSource.STORE))
        for chunk, left in zip(fill.chunks, unpublished, strict=False):
            if left:
                outcomes[chunk] = ChunkOutcome(KVSource.COMPUTED, MissReason.NOT_STORED, Unpublished.STORE_FULL)
        self.scheduler.loaded(fill, outcomes, {"lookup": 1, "prefill": 2, "load": 3})

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
            self.scheduler.ran([rows])
            if rows.decodes or rows.last_of_prompt:
                self.scheduler.token(rows.sequence, Choice(token_id, None), next(self._now))

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

    # -- what is seen -------------------------------------------------------------------------------
    def listen(self) -> None:
        for sequence, event in self.scheduler.take_events():
            self.events.setdefault(sequence, []).append(event)

    def states(self) -> str:
        """The first letters of all requests' states, in the order in which they came."""
        return "".join(sequence.state[0] for sequence in self.sequences)

    def check(self) -> None:
        """Every page has one owner, every hold one holder; every request stands in one place and is told one end."""
        self.residents.check_integrity()
        alive = [sequence for sequence in self.sequences if not sequence.done]
        assert sorted(map(id, self.scheduler.everyone)) == sorted(map(id, alive))
        tails = [page for sequence in self.sequences for page in sequence.tail_pages]
        assert len(tails) == len(set(tails)) == self.pool.count()["tail"]
        held = Counter[int]()
        for sequence in self.sequences:
            admitted = sequence.state in (State.LOADING, State.PREFILLING, State.DECODING)
            chunks = [chunk.resident for chunk in sequence.composition.chunks if chunk.resident is not None]
            assert len(chunks) == (len(sequence.composition.chunks) if admitted else 0)
            assert bool(sequence.tail_pages) == admitted
            held.update(map(id, chunks))
            if sequence.fill is not None and sequence.fill not in self.loads:
                held.update(map(id, sequence.fill.chunks.values()))
        for fill in self.loads:
            held.update(map(id, fill.chunks.values()))
        assert {id(c): c.holders for c in self.residents._chunks.values() if c.holders} == held
        decoding = sum(sequence.state in (State.PREFILLING, State.DECODING) for sequence in alive)
        assert decoding <= self.batch_max
        for tenant in {sequence.tenant for sequence in self.sequences}:
            mine = [sequence.state for sequence in alive if sequence.tenant == tenant]
            waiting = mine.count(State.WAITING)
            assert self.places.of(tenant) == (len(mine) - waiting, waiting)
        self.listen()
        for sequence in self.sequences:
            told = self.events.get(sequence, [])
            tokens = [event for event in told if isinstance(event, Tokens)]
            assert [choice.token_id for event in tokens for choice in event.choices] == sequence.generated
            assert len(told) - len(tokens) == sequence.done, "one end, once"
            assert not sequence.done or not isinstance(told[-1], Tokens), "nothing after the end"

    def check_idle(self) -> None:
        self.check()
        assert not self.scheduler.everyone and self.residents.held == 0
        pages = self.pool.count()
        assert pages["tail"] == 0 and pages["chunk"] == sum(c.run.pages for c in self.residents._chunks.values())

    def reason(self, sequence: Sequence) -> FinishReason | None:
        self.listen()
        end = self.events[sequence][-1]
        return end.reason if isinstance(end, Finished) else None


class Ahead(Scheduled):
    """The same beside a device: each step is read when the next one has begun. Keeps to itself what steps must keep."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.forwards: Forwards = options["forwards"]
        self.in_flight: list[list[Rows]] = []
        self.steps_since_piece = self.steps_owed = 0

    def run(self, plan: StepPlan, token_id: int = 7) -> None:
        self.check_plan(plan)
        for rows in ([piece] for piece in plan.alone):
            self._begin(rows, token_id)
        if plan.packed:
            self._begin(plan.packed, token_id)
        if not plan.rows:
            self._read(0, token_id)

    def _begin(self, rows: list[Rows], token_id: int) -> None:
        self.ran += rows
        self.scheduler.ran(rows)
        self.in_flight.append(rows)
        self._read(1, token_id)

    def _read(self, unread: int, token_id: int) -> None:
        while len(self.in_flight) > unread:
            for rows in self.in_flight.pop(0):
                if rows.decodes or rows.last_of_prompt:
                    self.scheduler.token(rows.sequence, Choice(token_id, None), next(self._now))

    def check_plan(self, plan: StepPlan) -> None:
        """Before anything of it runs."""
        drawing = [s for s in self.sequences if not s.done and s.slot >= 0 and 0 < s.drawn < s.params.max_tokens]
        slots = [s.slot for s in self.sequences if s.state in (State.PREFILLING, State.DECODING)]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(self.batch_max))
        assert all(s.state is State.PREFILLING and not s.tail_tokens for s in plan.opened)
        assert not (plan.alone and plan.packed)
        if plan.alone:
            rows_alone = sum(rows.count for rows in plan.alone)
            assert not drawing or self.steps_since_piece >= self.steps_owed
            assert rows_alone <= self.forwards.piece_tokens
            self.steps_since_piece = 0
            self.steps_owed = STEPS_A_PIECE if rows_alone > self.forwards.piece_tokens // SHORT_PIECE else 1
            return
        self.steps_since_piece += bool(plan.packed)
        decodes = plan.packed[: len(drawing)]
        assert all(rows.decodes for rows in decodes) and not any(rows.decodes for rows in plan.packed[len(drawing) :])
        assert {id(rows.sequence) for rows in decodes} == set(map(id, drawing)), "nobody who decodes is left out"
        assert len(decodes) == len(drawing)
        assert all((rows.first, rows.count) == (rows.sequence.tail_tokens, 1) for rows in decodes)
        assert sum(rows.count for rows in plan.packed) <= max(self.forwards.rows, len(drawing))
        self._check_order(plan)

    def _check_order(self, plan: StepPlan) -> None:
        """A later prompt has rows only where every earlier one has all that it could have."""
        there = [s for s in self.scheduler.everyone if s.state is State.PREFILLING]
        taken = {id(rows.sequence): rows for rows in plan.packed if not rows.decodes}
        waits = False
        for sequence in there:
            left = [c for c in sequence.composition.chunks if c.computed is not None and c.computed < len(c.token_ids)]
            tokens = len(left[0].token_ids if left else sequence.composition.tail)
            wanted = tokens - ((left[0].computed or 0) if left else sequence.tail_tokens)
            if self.forwards.alone(tokens, chunk=bool(left)):
                assert id(sequence) not in taken
                continue
            rows = taken.get(id(sequence))
            assert not (waits and rows), "first come first served"
            if wanted > 0:
                assert rows is None or rows.chunk is (left[0] if left else None)
                waits |= rows is None or rows.count < wanted
        if taken or waits:
            assert taken or sum(rows.count for rows in plan.packed) >= self.forwards.rows, "prompts go on"
