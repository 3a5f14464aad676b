"""What is brought into the pool: fills from their admission until nobody writes to their chunks any more.

A chunk that several requests wait for is filled once, by the first of them. What a load does not bring is computed in
rows of its request, which waits meanwhile. Where nobody fills a chunk any more its key is returned: who waits for it
is to try for itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chunk_store.key import ChunkKey
    from decode_service.prompt.request_chunk import ChunkOutcome, RequestChunk
    from decode_service.scheduling.admission import Admission, Fill
    from decode_service.scheduling.line import FillRoom
    from decode_service.scheduling.sequence import Sequence
    from serving.trace.stages import Stage


class Fills:
    """Loads that are under way, and chunks that are computed here. ``room`` bounds who waits for them."""

    def __init__(self, admission: Admission, room: FillRoom) -> None:
        self._admission = admission
        self._room = room
        self._loads: set[Fill] = set()  # that are under way, whether their request still waits or not

    def begin(self, fill: Fill) -> None:
        """A request was admitted, whose fill this is from now on."""
        fill.sequence.fill = fill
        if fill.loading:
            self._loads.add(fill)

    def may_ask(self, fill: Fill, *, others_wait: bool) -> bool:
        """A load needs KV that has to be computed elsewhere: whether it may wait for that."""
        assert fill.stay is not None
        return self._room.may_ask(fill.stay, others_wait=others_wait)

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

    def loaded(
        self, fill: Fill, outcomes: Mapping[RequestChunk, ChunkOutcome], spent_ns: Mapping[Stage, int]
    ) -> set[ChunkKey]:
        """A load is over; ``outcomes`` are of chunks that have not come before. What nobody fills of it."""
        for chunk, outcome in outcomes.items():
            self.came(fill, chunk, outcome)
        self._end_load(fill)
        if fill.sequence.fill is fill:
            fill.sequence.clock.measured_ns.update(spent_ns)
            return set()
        return self._give_up(fill)  # nobody computes the rest

    def failed(self, fill: Fill) -> set[ChunkKey]:
        """A load ends without what has not come: nobody fills that."""
        self._end_load(fill)
        return self._admission.fill_failed(fill)

    def computed(self, sequence: Sequence, chunk: RequestChunk, rows: int) -> None:
        """Rows of a chunk were launched: what is launched later finds their KV in the pool."""
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

    def stop_waiting(self, fill: Fill) -> None:
        """Its request waits for nothing more."""
        self._room.stop_waiting(fill.stay)

    def leave(self, fill: Fill) -> set[ChunkKey]:
        """Its request has gone; a load that is under way holds its chunks itself. What nobody fills of it."""
        self.stop_waiting(fill)
        fill.drop_claims()
        fill.note_abandoned()
        return self._give_up(fill)

    def note_abandoned(self) -> None:
        """Tells the loads that nobody waits for."""
        for fill in self._loads:
            fill.note_abandoned()

    def abandon(self) -> None:
        """Nobody waits for any load."""
        for fill in self._loads:
            fill.abandoned = True

    def _end_load(self, fill: Fill) -> None:
        fill.loading = False
        self._loads.discard(fill)
        self._room.stop_loading(fill.stay)

    def _give_up(self, fill: Fill) -> set[ChunkKey]:
        """What the request, which has gone, was to fill."""
        return self._admission.fill_failed(fill) if fill.chunks and not fill.loading else set()
