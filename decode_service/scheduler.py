"""The scheduler: events of requests in, what runs next out. It owns every request's state.

No tensors, no threads and no clock: the times (monotonic nanoseconds) come with the events. One thread calls it,
between the launches of a device.

    waiting --- chunks' pages ---> loading --- all KV there ---> prefilling --- first token ---> decoding
        ^                            |         and a place            |                             |
        +--- put off, sent back -----+           ended <--------------+--- aborted, failed, done ---+
        +--- gave its pages to an answer that grew -------------------+-----------------------------+

A step is a list of (request, rows): rows of its tail, or of a chunk that is computed here. Everybody who decodes has a
row in every step; what room is left takes slices of prompts, first come first served. Pieces that the runner computes
alone come between steps (``Turns`` says when). A request may have rows in a step before the token of the step before it
was read: it is drawn in the request's slot, and taken from there.

A tail takes pages as it grows (``tails.py``). Where there are none left somebody gives up all that it holds of the
pool (``giving_way.py``), waits where it stood, and goes on with the tokens it has: none is drawn twice. Its pages are
others' at once: whatever is launched for them comes later on the device's stream. The token of a step that it was still
in reaches it while it waits, and it does not go on before.

A chunk that several requests wait for is filled once, by the first of them. Who is admitted next, and who waits for
what, is decided by the rules in ``line.py``; ``admission.py`` holds the pages.

What a load does not bring is computed here, while its request still waits for the rest: that takes no place to decode.
A request for chunks alone ends when they are in the pool, and never leaves ``loading`` for another state.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from decode_service import kept
from decode_service.admission import Admission, Fill
from decode_service.giving_way import GaveWay, rank, who_gives_way
from decode_service.line import FillRoom, Line, by_priority
from decode_service.next_rows import NextRows
from decode_service.sequence import (
    AllReady,
    ChunkReady,
    Event,
    Failed,
    Finished,
    FinishReason,
    Sequence,
    State,
    Tokens,
)
from decode_service.starts import Starts, not_started
from decode_service.step_plan import Forwards, Rows, StepPlan
from decode_service.tails import Tails
from engine.kv.pages import PageTable
from engine.sight import EVERYTHING, Sight
from serving.errors import InvalidRequest
from text.grammar import GrammarFailed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Items

    from chunk_store.key import ChunkKey
    from chunk_store.tenant import Tenant
    from decode_service.prompt.request_chunk import ChunkOutcome, RequestChunk
    from engine.kv.resident import ResidentChunks
    from engine.plan import CascadePlan
    from engine.sampling.params import Choice
    from serving.errors import RequestError
    from serving.tenancy.places import TenantPlaces
    from serving.trace.stages import Stage
    from text.grammar import Matcher

NEXT_STATES = {
    State.WAITING: {State.LOADING, State.ENDED},
    State.LOADING: {State.WAITING, State.PREFILLING, State.ENDED},
    State.PREFILLING: {State.WAITING, State.DECODING, State.ENDED},
    State.DECODING: {State.WAITING, State.ENDED},
    State.ENDED: set[State](),
}


def grammar_failed(error: GrammarFailed) -> RequestError:
    """What the caller is told whose answer cannot go on."""
    return InvalidRequest(f"too complex to go on: {error}", field="grammar", remedy="make it simpler")


def has_its_kv(sequence: Sequence) -> bool:
    """Whether all KV is there but what bypasses the caches."""
    return sequence.bypass or all(chunk.held.ready for chunk in sequence.chunks_held)


def awaits_token(sequence: Sequence) -> bool:
    """Whether a token of a request that gave its pages up was not read yet."""
    return len(sequence.generated) < sequence.awaited


def note_filled(sequence: Sequence, now: int) -> None:
    """A request's KV is there. What was computed here is time of the stage that computing elsewhere takes."""
    clock = sequence.clock
    if clock.first_token:
        return
    clock.filled = now
    if any(chunk.outcome is not None and chunk.outcome.here for chunk in sequence.composition.chunks):
        spent = clock.measured_ns
        computed = now - clock.admitted - spent.get("lookup", 0) - spent.get("load", 0)
        spent["prefill"] = max(computed, spent.get("prefill", 0))


class Scheduler:
    """Requests from ``submit`` to their last event.

    ``places`` counts who waits and runs, by tenant; ``forwards`` says what a step can take, ``sight`` what rows see.
    """

    def __init__(
        self,
        residents: ResidentChunks,
        places: TenantPlaces,
        forwards: Forwards,
        *,
        eos_token_ids: frozenset[int],
        batch_max: int,
        aside: PageTable | None = None,
        sight: Sight = EVERYTHING,
    ) -> None:
        """``aside``: of host memory, where tails are kept that gave up their pages."""
        pool = residents.pool
        self._places = places
        self._eos_token_ids = eos_token_ids
        self._batch_max = batch_max
        self._page_size = pool.page_size
        self._room = FillRoom(batch_max, chunk_pages=pool.chunk_pages, tail_pages=pool.pages - pool.chunk_pages)
        self._residents = residents
        aside = aside or PageTable(pages=0, chunk_pages=0, page_size=pool.page_size)
        self._tails = Tails(pool, aside, sight, piece_tokens=forwards.piece_tokens)
        self._admission = Admission(residents, self._room, self._tails, sight)
        self._line = Line(self._may_enter)
        self._starts = Starts()
        self._line_moved = False  # whether somebody may fit who did not before
        self._free_slots = deque(range(batch_max))
        self._opened: list[Sequence] = []
        self._admitted: dict[State, list[Sequence]] = {
            state: [] for state in (State.LOADING, State.PREFILLING, State.DECODING)
        }
        self._loads: set[Fill] = set()  # that are under way, whether their request still waits or not
        self._for_a_place = 0  # requests whose KV is all there and who wait for a place to decode
        self._next = NextRows(forwards, self._tails.room_for)
        self._gave_way: list[tuple[Sequence, GaveWay]] = []
        self._events: list[tuple[Sequence, Event]] = []

    # -- what stands where --------------------------------------------------------------------------
    @property
    def everyone(self) -> list[Sequence]:
        return [*self._line, *(sequence for there in self._admitted.values() for sequence in there)]

    @property
    def loads_max(self) -> int:
        """Loads that can be under way at once."""
        return self._room.stays_max

    @property
    def running(self) -> int:
        """Requests for answers that are admitted."""
        for_chunks = sum(sequence.for_chunks for sequence in self._admitted[State.LOADING])
        return sum(map(len, self._admitted.values())) - for_chunks

    @property
    def busy(self) -> bool:
        """Whether there are rows to run, or somebody may go on, without anything more coming in."""
        running = self._admitted[State.PREFILLING] or self._admitted[State.DECODING]
        return bool(running or self._line_moved or self._next.computing(self._admitted))

    @property
    def tail_tokens_max(self) -> int:
        """Tokens that a tail can have."""
        return self._tails.tokens_max

    def check_size(self, sequence: Sequence) -> None:
        """Raises ``Unsupported`` if the pool could never hold the sequence. May be called from any thread."""
        self._admission.check_size(sequence)

    # -- events -------------------------------------------------------------------------------------
    def submit(self, sequence: Sequence, now: int) -> None:
        """A request comes; its tenant's place was taken before."""
        sequence.clock.submitted = now
        self._line.add(sequence)
        self._starts.add(sequence)
        self._line_moved = True

    def may_ask(self, fill: Fill) -> bool:
        """A load needs KV that has to be computed elsewhere: whether it may wait for that."""
        assert fill.stay is not None
        may = self._room.may_ask(fill.stay, others_wait=self._line.asks)
        self._line_moved |= may  # its place among those that are read for is free
        return may

    def came(self, fill: Fill, chunk: RequestChunk, outcome: ChunkOutcome) -> None:
        """One chunk of a load is there, or is to be computed here, while the load goes on with the others."""
        wanted = fill.sequence.fill is fill
        if not outcome.here:
            self._admission.filled(fill, chunk)
        elif outcome.claim is not None and not wanted:
            outcome.claim.drop()
        elif outcome.claim is not None:
            fill.claims[chunk] = outcome.claim
        if wanted:  # it has not ended, nor was it returned to the queue
            fill.sequence.note_outcome(chunk, outcome)
            chunk.computed = 0 if outcome.here else None

    def loaded(self, fill: Fill, outcomes: Mapping[RequestChunk, ChunkOutcome], spent_ns: Mapping[Stage, int]) -> None:
        """A load is over; ``outcomes`` are of chunks that have not come before."""
        for chunk, outcome in outcomes.items():
            self.came(fill, chunk, outcome)
        self._end_load(fill)
        if fill.sequence.fill is fill:
            fill.sequence.clock.measured_ns.update(spent_ns)
        else:  # nobody computes the rest
            self._give_up(fill)

    def load_failed(self, fill: Fill, error: RequestError, now: int) -> None:
        """Ends the request. Those that wait for its chunks try for themselves: they have time of their own."""
        self._end_load(fill)
        keys = self._admission.fill_failed(fill)
        if fill.sequence.fill is fill:
            self._end(fill.sequence, Failed(error), now)
        self._send_back(keys)

    def put_off(self, fill: Fill) -> None:
        """Its KV has to be computed, and enough requests wait for that: until one of them is done it holds nothing."""
        self._end_load(fill)
        keys = self._admission.fill_failed(fill)
        fill.sequence.cold = True
        self._send_back(keys, also=fill)

    def ran(self, rows: Items[Rows], plan: CascadePlan | None = None) -> None:
        """Rows were launched: what is launched later finds their KV in the pool. ``plan``: of these rows, in order."""
        row = 0
        for each in rows:
            if each.chunk is not None:
                self._computed(each.sequence, each.chunk, each.count)
            else:
                if plan is not None and each.decodes and each.sequence.tail_level is None:
                    each.sequence.note_levels(plan, row, self._page_size)
                each.sequence.tail_tokens += each.count
                for other in each.also:
                    other.tail_tokens = each.sequence.tail_tokens
                    self._tails.begin_behind(other, each.copied_from)
                self._note_known(each.sequence)
                self._let_unseen_go(each.sequence, *each.also)
            row += each.count

    def _let_unseen_go(self, *sequences: Sequence) -> None:
        """What no row to come sees is others'."""
        for sequence in sequences:
            self._tails.give_back(sequence)
            self._admission.let_unseen_go(sequence)

    def token(self, sequence: Sequence, choice: Choice, now: int) -> None:
        """A request's next token was drawn; the first one makes it decode. It may have given up its pages since."""
        if sequence.done:
            return
        sequence.clock.first_token = sequence.clock.first_token or now
        if sequence.state is State.PREFILLING:
            self._enter(sequence, State.DECODING)
        elif sequence.state is not State.DECODING:
            self._line_moved = True  # it waited for this token
        sequence.generated.append(choice.token_id)
        self._events.append((sequence, Tokens((choice,))))
        if sequence.grammar is not None and self._follow(sequence, sequence.grammar, choice.token_id, now):
            return
        params = sequence.params
        stops = choice.token_id in params.stop_token_ids
        stops |= not params.ignore_eos and choice.token_id in self._eos_token_ids
        if stops and len(sequence.generated) >= params.min_tokens:
            self._end(sequence, Finished(FinishReason.STOP), now)
        elif len(sequence.generated) >= params.max_tokens:
            self._end(sequence, Finished(FinishReason.LENGTH), now)

    def _follow(self, sequence: Sequence, grammar: Matcher, token_id: int, now: int) -> bool:
        """An answer's grammar takes its next token: whether that was its last one."""
        try:
            grammar.accept(token_id)
        except GrammarFailed as error:
            self._end(sequence, Failed(grammar_failed(error)), now)
            return True
        if grammar.is_over:
            self._end(sequence, Finished(FinishReason.STOP), now)
        return grammar.is_over

    def fail(self, sequence: Sequence, error: RequestError, now: int) -> None:
        """What a request was in went wrong. One that has ended is left alone."""
        self._end(sequence, Failed(error), now)

    def end(self, owner: Tenant, request_id: str, reason: FinishReason, now: int) -> None:
        """An owner's request is over, because its caller says so. One that is not here is ignored."""
        for sequence in self.everyone:
            if (sequence.owner, sequence.request_id) == (owner, request_id):
                self._end(sequence, Finished(reason), now)

    def finish(self, sequence: Sequence, reason: FinishReason, now: int) -> None:
        """One answer is over, the others of its request go on. Harmless after its end."""
        self._end(sequence, Finished(reason), now)

    def abandon(self, error: RequestError, now: int) -> None:
        """Everybody fails; the pool is left as it is. Nothing may come afterwards."""
        for sequence in self.everyone:
            sequence.state, sequence.grammar = State.ENDED, None
            sequence.clock.finished = now
            self._events.append((sequence, Failed(error)))
            if sequence.fill is not None:
                sequence.fill.drop_claims()
        for fill in self._loads:
            fill.abandoned = True

    # -- what comes of them -------------------------------------------------------------------------
    def take_events(self) -> list[tuple[Sequence, Event]]:
        """What requests have to be told since the last time, in order."""
        events, self._events = self._events, []
        return events

    def take_gave_way(self) -> list[tuple[Sequence, GaveWay]]:
        """Who gave its pages up since the last time, and to what."""
        gave_way, self._gave_way = self._gave_way, []
        return gave_way

    def plan(self, now: int) -> StepPlan:
        """Gives pages to those who run, takes in who fits, and says what runs next."""
        for late in self._starts.late(now):
            self._end(late, Failed(not_started()), now)
        self._grow()
        admitted = self._admit(now)
        rows = [self._copying(each) if each.also else each for each in self._next.rows(self._admitted)]
        opened, self._opened = self._opened, []
        for fill in self._loads:
            fill.note_abandoned()
        evicted, moves = self._admission.take_evicted(), self._tails.take_moves()
        given_back = self._tails.take_given_back()
        return StepPlan(tuple(admitted), evicted, moves, tuple(opened), tuple(rows), given_back)

    def _copying(self, rows: Rows) -> Rows:
        """Rows with others behind them, who have the tail's pages from the first on that their own rows see."""
        return replace(rows, copied_from=self._tails.pages_unseen(rows.sequence, rows.first + rows.count))

    def _grow(self) -> None:
        """Pages for the next rows of all who run, in the order of their right to them."""
        for sequence in sorted(filter(self._lacks_pages, self._running), key=rank):
            while sequence.slot >= 0 and not self._tails.grow(sequence, self._tails.wanted(sequence)):
                self._give_way(who_gives_way(self._running), GaveWay.GROWTH)

    @property
    def _running(self) -> list[Sequence]:
        return [*self._admitted[State.DECODING], *self._admitted[State.PREFILLING]]

    def _lacks_pages(self, sequence: Sequence) -> bool:
        return not self._tails.has_room(sequence, self._tails.wanted(sequence))

    def _give_way(self, sequence: Sequence, why: GaveWay) -> None:
        """Somebody who runs gives up all that it holds of the pool, and waits where it stood."""
        slot = sequence.slot
        sequence.give_up(aside=self._tails.put_aside(sequence))
        self._enter(sequence, State.WAITING)
        self._free_slots.append(slot)
        self._leave(sequence)
        self._gave_way.append((sequence, why))

    def _note_known(self, sequence: Sequence) -> None:
        """An answer that goes on decodes once all that is known of it is in the pool."""
        goes_on = sequence.resumed and sequence.state is State.PREFILLING
        if goes_on and sequence.tail_tokens >= sequence.known_tokens:
            self._enter(sequence, State.DECODING)

    def _admit(self, now: int) -> list[Fill]:
        """Takes waiting requests in while there are places to decode; one that waits for KV takes none of them."""
        admitted: list[Fill] = []
        self._take_ready(now)
        while self._line_moved:
            fill = self._line.next(self._admission.admit)
            if fill is None:
                self._line_moved = False
                break
            fill.sequence.fill = fill
            fill.sequence.clock.admitted = fill.sequence.clock.admitted or now
            self._enter(fill.sequence, State.LOADING)
            if fill.loading:
                self._loads.add(fill)
            admitted.append(fill)
            self._take_ready(now)
        return admitted

    def _may_enter(self, sequence: Sequence) -> bool:
        """Whether nothing but pages keeps a request from being admitted; one for chunks alone needs nothing else."""
        if sequence.for_chunks:
            return True
        return self._free_places > self._for_a_place and self._places.may_run(sequence.tenant)

    @property
    def _free_places(self) -> int:
        """How many more could decode."""
        return self._batch_max - len(self._admitted[State.DECODING]) - len(self._admitted[State.PREFILLING])

    def _take_ready(self, now: int) -> None:
        """Who has all KV there, or computes the rest, goes on as far as there are places."""
        self._for_a_place = 0
        pages_left = True  # for who is next: those behind it may be smaller, and wait
        for sequence in by_priority(self._admitted[State.LOADING]):
            fill = sequence.fill
            if sequence.for_chunks:
                self._tell_ready(sequence, now)
                continue
            if fill is None or fill.loading or not has_its_kv(sequence):
                continue
            pages_left = pages_left and self._free_places > 0 and (awaits_token(sequence) or self._tails.take(sequence))
            if awaits_token(sequence) or not pages_left:
                self._for_a_place += 1
                continue
            self._enter(sequence, State.PREFILLING)
            sequence.slot = self._free_slots.popleft()
            sequence.go_on()
            self._starts.started(sequence)
            self._opened.append(sequence)
            self._room.stop_waiting(fill.stay)
            note_filled(sequence, now)
            self._note_known(sequence)

    def _tell_ready(self, sequence: Sequence, now: int) -> None:
        """A request for chunks is told of each that can be read by whatever is launched from now on."""
        chunks = sequence.composition.chunks
        for chunk in chunks:
            if chunk.held.ready and chunk not in sequence.told:
                sequence.told.add(chunk)
                self._events.append((sequence, ChunkReady(chunk)))
        if len(sequence.told) == len(chunks) and sequence.fill is not None and not sequence.fill.loading:
            sequence.clock.filled = now
            self._end(sequence, AllReady(), now)

    # -- transitions --------------------------------------------------------------------------------
    def _enter(self, sequence: Sequence, state: State) -> None:
        """The one place where a request's state changes, and with it where it stands and what its tenant counts."""
        before, tenant = sequence.state, sequence.tenant
        if state not in NEXT_STATES[before]:
            raise RuntimeError(f"a request that is {before} cannot become {state}")
        sequence.state = state
        if not sequence.for_chunks:  # whoever asks for chunks has counted that
            self._count(tenant, before, state)
        if before is not State.WAITING:
            self._admitted[before].remove(sequence)
        elif state is State.ENDED:  # otherwise the line has let it go
            self._line.remove(sequence)
        if state is State.WAITING:
            self._line.put_back(sequence)
        elif state is not State.ENDED:
            self._admitted[state].append(sequence)
        elif before in (State.PREFILLING, State.DECODING):
            self._free_slots.append(sequence.slot)

    def _count(self, tenant: Tenant, before: State, state: State) -> None:
        """What a tenant's requests take of what it may have."""
        if before is State.WAITING:
            (self._places.leave if state is State.ENDED else self._places.admit)(tenant)
        elif state is State.WAITING:
            self._places.put_back(tenant)
        elif state is State.ENDED:
            self._places.end(tenant)

    def _computed(self, sequence: Sequence, chunk: RequestChunk, rows: int) -> None:
        assert chunk.computed is not None
        chunk.computed += rows
        if chunk.computed < len(chunk.token_ids):
            return
        fill = sequence.fill
        if fill is not None and chunk in fill.chunks:
            self._admission.filled(fill, chunk)
            if chunk in fill.claims:
                fill.claims.pop(chunk).publish(chunk.held)
        else:  # it bypasses the caches
            chunk.held.ready = True

    def _end_load(self, fill: Fill) -> None:
        fill.loading = False
        self._loads.discard(fill)
        self._room.stop_loading(fill.stay)
        self._line_moved = True

    def _give_up(self, fill: Fill) -> None:
        """Nobody fills what this request, which has gone, was to fill: others try for themselves."""
        if fill.chunks and not fill.loading:
            self._send_back(self._admission.fill_failed(fill))

    def _send_back(self, keys: set[ChunkKey], also: Fill | None = None) -> None:
        """Returns who waits for chunks that nobody fills any more to the queue; their own loads go on."""
        for sequence in list(self._admitted[State.LOADING]):
            fill = sequence.fill
            if sequence.state is State.LOADING and fill is not None and (fill is also or keys & fill.awaited):
                self._enter(sequence, State.WAITING)
                self._leave(sequence)

    def _end(self, sequence: Sequence, event: Finished | Failed | AllReady, now: int) -> None:
        """Ends a sequence wherever it stands and gives back all it holds. Harmless a second time."""
        if sequence.done:
            return
        if isinstance(event, Finished):
            kept.leave(self._residents, sequence)
        self._enter(sequence, State.ENDED)
        sequence.grammar = None
        sequence.clock.finished = now
        self._events.append((sequence, event))
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """A sequence gives back what it holds; a load that is under way holds its chunks itself."""
        fill, sequence.fill = sequence.fill, None
        self._admission.release(sequence)
        if sequence.done:
            self._tails.forget(sequence)
            self._starts.forget(sequence)
        self._line_moved = True
        if fill is not None:
            self._room.stop_waiting(fill.stay)
            fill.drop_claims()
            fill.note_abandoned()
            self._give_up(fill)
