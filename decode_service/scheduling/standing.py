"""Where requests stand, and what that takes: a place in the line or one to decode, and of what their tenants may have.

    waiting --- chunks' pages ---> loading --- all KV there ---> prefilling --- first token ---> decoding
        ^                            |         and a place            |                             |
        +--- put off, sent back -----+           ended <--------------+--- aborted, failed, done ---+
        +--- gave its pages to an answer that grew -------------------+-----------------------------+

A request for chunks alone takes no place to decode: it ends when they are in the pool, and never leaves ``loading``
for another state. Nobody here holds pages.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from decode_service.scheduling.line import Line
from decode_service.scheduling.sequence import State
from decode_service.scheduling.starts import Starts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Sequence as Items

    from chunk_store.tenant import Tenant
    from decode_service.scheduling.admission import Fill
    from decode_service.scheduling.line import Misfit
    from decode_service.scheduling.sequence import Sequence
    from serving.tenancy.places import TenantPlaces

NEXT_STATES = {
    State.WAITING: {State.LOADING, State.ENDED},
    State.LOADING: {State.WAITING, State.PREFILLING, State.ENDED},
    State.PREFILLING: {State.WAITING, State.DECODING, State.ENDED},
    State.DECODING: {State.WAITING, State.ENDED},
    State.ENDED: set[State](),
}


class Standing:
    """Requests from ``add`` to their end, of which ``batch_max`` may decode.

    ``places`` counts who waits and runs, by tenant.
    """

    def __init__(self, places: TenantPlaces, batch_max: int) -> None:
        self._places = places
        self._batch_max = batch_max
        self._line = Line(self._may_enter)
        self._line_moved = False  # whether somebody may fit who did not before
        self._starts = Starts()
        self._free_slots = deque(range(batch_max))
        self._admitted: dict[State, list[Sequence]] = {
            state: [] for state in (State.LOADING, State.PREFILLING, State.DECODING)
        }
        self.for_a_place = 0  # requests whose KV is all there and who wait for a place to decode

    @property
    def everyone(self) -> list[Sequence]:
        return [*self._line, *(sequence for there in self._admitted.values() for sequence in there)]

    @property
    def admitted(self) -> Mapping[State, Items[Sequence]]:
        """Those who are admitted, by state, in the order in which they entered it."""
        return self._admitted

    @property
    def loading(self) -> list[Sequence]:
        return list(self._admitted[State.LOADING])

    @property
    def with_slots(self) -> list[Sequence]:
        """Those who have a place to decode, and tail pages."""
        return [*self._admitted[State.DECODING], *self._admitted[State.PREFILLING]]

    @property
    def running(self) -> int:
        """Requests for answers that are admitted."""
        for_chunks = sum(sequence.for_chunks for sequence in self._admitted[State.LOADING])
        return sum(map(len, self._admitted.values())) - for_chunks

    @property
    def free_places(self) -> int:
        """How many more could decode."""
        return self._batch_max - len(self._admitted[State.DECODING]) - len(self._admitted[State.PREFILLING])

    # -- the line -----------------------------------------------------------------------------------
    def add(self, sequence: Sequence) -> None:
        """A request comes; its tenant's place was taken before."""
        self._line.add(sequence)
        self._starts.add(sequence)
        self._line_moved = True

    @property
    def line_moved(self) -> bool:
        """Whether ``next`` may find somebody."""
        return self._line_moved

    @property
    def asks(self) -> bool:
        """Whether somebody waits to wait for KV that is computed elsewhere."""
        return self._line.asks

    def look_again(self) -> None:
        """Something was given back: whoever waits may fit now."""
        self._line_moved = True

    def next(self, admit: Callable[[Sequence, set[Misfit]], Fill | Misfit]) -> Fill | None:
        """The next request of the line, loading, as ``admit`` made it enter; None if nobody can now."""
        fill = self._line.next(admit) if self._line_moved else None
        self._line_moved = fill is not None
        if fill is not None:
            self.enter(fill.sequence, State.LOADING)
        return fill

    def _may_enter(self, sequence: Sequence) -> bool:
        """Whether nothing but pages keeps a request from being admitted; one for chunks alone needs nothing else."""
        if sequence.for_chunks:
            return True
        return self.free_places > self.for_a_place and self._places.may_run(sequence.tenant)

    def late(self, now: int) -> list[Sequence]:
        """Who was to begin by now, and has not begun."""
        return self._starts.late(now)

    # -- from one state to another ------------------------------------------------------------------
    def enter(self, sequence: Sequence, state: State) -> None:
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
        self._note_slot(sequence, before, state)

    def _note_slot(self, sequence: Sequence, before: State, state: State) -> None:
        """A slot is a request's from the time when it begins, or goes on, until it ends or gives way."""
        if state is State.PREFILLING:
            sequence.slot = self._free_slots.popleft()
            self._starts.started(sequence)
        elif state is not State.DECODING and before in (State.PREFILLING, State.DECODING):
            self._free_slots.append(sequence.slot)
        if state is State.ENDED:
            self._starts.forget(sequence)

    def _count(self, tenant: Tenant, before: State, state: State) -> None:
        """What a tenant's requests take of what it may have."""
        if before is State.WAITING:
            (self._places.leave if state is State.ENDED else self._places.admit)(tenant)
        elif state is State.WAITING:
            self._places.put_back(tenant)
        elif state is State.ENDED:
            self._places.end(tenant)

    def note_known(self, sequence: Sequence) -> None:
        """An answer that goes on decodes once all that is known of it is in the pool."""
        goes_on = sequence.resumed and sequence.state is State.PREFILLING
        if goes_on and sequence.tail_tokens >= sequence.known_tokens:
            self.enter(sequence, State.DECODING)
