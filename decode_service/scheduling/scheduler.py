"""The scheduler: events of requests in, what runs next out. It owns every request's state.

No tensors, no threads and no clock: the times (monotonic nanoseconds) come with the events. One thread calls it,
between the launches of a device.

    standing.py    where each request stands, and how it may go on
    intake.py      who is admitted from the line, and who of them begins
    fills.py       what is brought into the pool for them
    leaving.py     who ends, is sent back or gives way, with all that it holds

A step is a list of (request, rows): rows of its tail, or of a chunk that is computed here. Everybody who decodes has a
row in every step; what room is left takes slices of prompts, first come first served. Pieces that the runner computes
alone come between steps (``Turns`` says when). A request may have rows in a step before the token of the step before it
was read: it is drawn in the request's slot, and taken from there.

A tail takes pages as it grows (``tails.py``). Where there are none left somebody gives up all that it holds of the
pool (``giving_way.py``), waits where it stood, and goes on with the tokens it has: none is drawn twice.

Who is admitted next, and who waits for what, is decided by the rules in ``line.py``; ``admission.py`` holds the pages.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from decode_service.scheduling.admission import Admission
from decode_service.scheduling.answer_end import end_behind
from decode_service.scheduling.fills import Fills
from decode_service.scheduling.giving_way import GaveWay, rank, who_gives_way
from decode_service.scheduling.intake import Intake
from decode_service.scheduling.leaving import Leaving
from decode_service.scheduling.line import FillRoom
from decode_service.scheduling.next_rows import NextRows
from decode_service.scheduling.sequence import Failed, Finished, State, Tokens
from decode_service.scheduling.standing import Standing
from decode_service.scheduling.starts import not_started
from decode_service.scheduling.step_plan import StepPlan
from decode_service.scheduling.tails import Tails
from engine.kv.pages import PageTable
from engine.sight import EVERYTHING, Sight

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Items

    from chunk_store.tenant import Tenant
    from decode_service.prompt.request_chunk import ChunkOutcome, RequestChunk
    from decode_service.scheduling.admission import Fill
    from decode_service.scheduling.sequence import Event, FinishReason, Sequence
    from decode_service.scheduling.step_plan import Forwards, Rows
    from engine.kv.resident import ResidentChunks
    from engine.plan import CascadePlan
    from engine.sampling.params import Choice
    from serving.errors import RequestError
    from serving.tenancy.places import TenantPlaces
    from serving.trace.stages import Stage


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
        self._eos_token_ids = eos_token_ids
        self._page_size = pool.page_size
        aside = aside or PageTable(pages=0, chunk_pages=0, page_size=pool.page_size)
        room = FillRoom(batch_max, chunk_pages=pool.chunk_pages, tail_pages=pool.pages - pool.chunk_pages)
        self.loads_max = room.stays_max  # loads that can be under way at once
        self._events: list[tuple[Sequence, Event]] = []
        self._tails = tails = Tails(pool, aside, sight, piece_tokens=forwards.piece_tokens)
        self._admission = admission = Admission(residents, room, tails, sight)
        self._standing = standing = Standing(places, batch_max)
        self._fills = fills = Fills(admission, room)
        self._leaving = Leaving(residents, standing, admission, tails, fills, self._tell)
        self._intake = Intake(standing, admission, tails, fills, self._leaving, self._tell)
        self._next = NextRows(forwards, tails.room_for)

    # -- what stands where --------------------------------------------------------------------------
    @property
    def everyone(self) -> list[Sequence]:
        return self._standing.everyone

    @property
    def running(self) -> int:
        """Requests for answers that are admitted."""
        return self._standing.running

    @property
    def busy(self) -> bool:
        """Whether there are rows to run, or somebody may go on, without anything more coming in."""
        standing = self._standing
        return bool(standing.with_slots or standing.line_moved or self._next.computing(standing.admitted))

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
        self._standing.add(sequence)

    def may_ask(self, fill: Fill) -> bool:
        """A load needs KV that has to be computed elsewhere: whether it may wait for that."""
        may = self._fills.may_ask(fill, others_wait=self._standing.asks)
        if may:  # its place among those that are read for is free
            self._standing.look_again()
        return may

    def came(self, fill: Fill, chunk: RequestChunk, outcome: ChunkOutcome) -> None:
        """One chunk of a load is there, or is to be computed here, while the load goes on with the others."""
        self._fills.came(fill, chunk, outcome)

    def loaded(self, fill: Fill, outcomes: Mapping[RequestChunk, ChunkOutcome], spent_ns: Mapping[Stage, int]) -> None:
        """A load is over; ``outcomes`` are of chunks that have not come before."""
        unfilled = self._fills.loaded(fill, outcomes, spent_ns)
        self._standing.look_again()
        self._leaving.send_back(unfilled)

    def load_failed(self, fill: Fill, error: RequestError, now: int) -> None:
        """Ends the request. Those that wait for its chunks try for themselves: they have time of their own."""
        unfilled = self._fills.failed(fill)
        self._standing.look_again()
        if fill.sequence.fill is fill:
            self._leaving.end(fill.sequence, Failed(error), now)
        self._leaving.send_back(unfilled)

    def put_off(self, fill: Fill) -> None:
        """Its KV has to be computed, and enough requests wait for that: until one of them is done it holds nothing."""
        unfilled = self._fills.failed(fill)
        self._standing.look_again()
        fill.sequence.cold = True
        self._leaving.send_back(unfilled, also=fill)

    def ran(self, rows: Items[Rows], plan: CascadePlan | None = None) -> None:
        """Rows were launched: what is launched later finds their KV in the pool. ``plan``: of these rows, in order."""
        row = 0
        for each in rows:
            if each.chunk is not None:
                self._fills.computed(each.sequence, each.chunk, each.count)
            else:
                if plan is not None and each.decodes and each.sequence.tail_level is None:
                    each.sequence.note_levels(plan, row, self._page_size)
                self._tail_ran(each)
            row += each.count

    def _tail_ran(self, rows: Rows) -> None:
        """A tail is longer by these rows; what no row to come sees is others'."""
        sequence = rows.sequence
        sequence.tail_tokens += rows.count
        for other in rows.also:
            other.tail_tokens = sequence.tail_tokens
            self._tails.begin_behind(other, rows.copied_from)
        self._standing.note_known(sequence)
        for each in (sequence, *rows.also):
            self._tails.give_back(each)
            self._admission.let_unseen_go(each)

    def token(self, sequence: Sequence, choice: Choice, now: int) -> None:
        """A request's next token was drawn; the first one makes it decode. It may have given up its pages since."""
        if sequence.done:
            return
        sequence.clock.first_token = sequence.clock.first_token or now
        if sequence.state is State.PREFILLING:
            self._standing.enter(sequence, State.DECODING)
        elif sequence.state is not State.DECODING:
            self._standing.look_again()  # it waited for this token
        sequence.generated.append(choice.token_id)
        self._tell(sequence, Tokens((choice,)))
        end = end_behind(sequence, choice.token_id, self._eos_token_ids)
        if end is not None:
            self._leaving.end(sequence, end, now)

    def fail(self, sequence: Sequence, error: RequestError, now: int) -> None:
        """What a request was in went wrong. One that has ended is left alone."""
        self._leaving.end(sequence, Failed(error), now)

    def end(self, owner: Tenant, request_id: str, reason: FinishReason, now: int) -> None:
        """An owner's request is over, because its caller says so. One that is not here is ignored."""
        for sequence in self.everyone:
            if (sequence.owner, sequence.request_id) == (owner, request_id):
                self.finish(sequence, reason, now)

    def finish(self, sequence: Sequence, reason: FinishReason, now: int) -> None:
        """One answer is over, the others of its request go on. Harmless after its end."""
        self._leaving.end(sequence, Finished(reason), now)

    def abandon(self, error: RequestError, now: int) -> None:
        """Everybody fails; the pool is left as it is. Nothing may come afterwards."""
        self._leaving.abandon(error, now)

    # -- what comes of them -------------------------------------------------------------------------
    def _tell(self, sequence: Sequence, event: Event) -> None:
        self._events.append((sequence, event))

    def take_events(self) -> list[tuple[Sequence, Event]]:
        """What requests have to be told since the last time, in order."""
        events, self._events = self._events, []
        return events

    def take_gave_way(self) -> list[tuple[Sequence, GaveWay]]:
        """Who gave its pages up since the last time, and to what."""
        return self._leaving.take_gave_way()

    def plan(self, now: int) -> StepPlan:
        """Gives pages to those who run, takes in who fits, and says what runs next."""
        for late in self._standing.late(now):
            self._leaving.end(late, Failed(not_started()), now)
        self._grow()
        admitted = self._intake.admit(now)
        rows = [self._copying(each) if each.also else each for each in self._next.rows(self._standing.admitted)]
        self._fills.note_abandoned()
        evicted, moves = self._admission.take_evicted(), self._tails.take_moves()
        given_back = self._tails.take_given_back()
        return StepPlan(tuple(admitted), evicted, moves, self._intake.take_opened(), tuple(rows), given_back)

    def _copying(self, rows: Rows) -> Rows:
        """Rows with others behind them, who have the tail's pages from the first on that their own rows see."""
        return replace(rows, copied_from=self._tails.pages_unseen(rows.sequence, rows.first + rows.count))

    def _grow(self) -> None:
        """Pages for the next rows of all who run, in the order of their right to them."""
        for sequence in sorted(filter(self._lacks_pages, self._standing.with_slots), key=rank):
            while sequence.slot >= 0 and not self._tails.grow(sequence, self._tails.wanted(sequence)):
                self._leaving.give_way(who_gives_way(self._standing.with_slots), GaveWay.GROWTH)

    def _lacks_pages(self, sequence: Sequence) -> bool:
        return not self._tails.has_room(sequence, self._tails.wanted(sequence))
