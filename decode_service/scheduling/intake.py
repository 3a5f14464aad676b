"""Who goes on: requests are admitted from the line, and begin once their KV is there and they have a place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from decode_service.scheduling.line import by_priority
from decode_service.scheduling.sequence import AllReady, ChunkReady, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from decode_service.scheduling.admission import Admission, Fill
    from decode_service.scheduling.fills import Fills
    from decode_service.scheduling.leaving import Leaving
    from decode_service.scheduling.sequence import Event, Sequence
    from decode_service.scheduling.standing import Standing
    from decode_service.scheduling.tails import Tails


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


class Intake:
    """Takes waiting requests in. ``tell`` is given what requests for chunks have to be told."""

    def __init__(
        self,
        standing: Standing,
        admission: Admission,
        tails: Tails,
        fills: Fills,
        leaving: Leaving,
        tell: Callable[[Sequence, Event], None],
    ) -> None:
        self._standing = standing
        self._admission = admission
        self._tails = tails
        self._fills = fills
        self._leaving = leaving
        self._tell = tell
        self._opened: list[Sequence] = []

    def admit(self, now: int) -> list[Fill]:
        """Takes requests in while there are places to decode; one that waits for KV takes none of them."""
        admitted: list[Fill] = []
        self._take_ready(now)
        while (fill := self._standing.next(self._admission.admit)) is not None:
            self._fills.begin(fill)
            fill.sequence.clock.admitted = fill.sequence.clock.admitted or now
            admitted.append(fill)
            self._take_ready(now)
        return admitted

    def take_opened(self) -> tuple[Sequence, ...]:
        """Who was given a slot since the last time."""
        opened, self._opened = tuple(self._opened), []
        return opened

    def _take_ready(self, now: int) -> None:
        """Who has all KV there, or computes the rest, goes on as far as there are places."""
        standing = self._standing
        standing.for_a_place = 0
        pages_left = True  # for who is next: those behind it may be smaller, and wait
        for sequence in by_priority(standing.loading):
            fill = sequence.fill
            if sequence.for_chunks:
                self._tell_ready(sequence, now)
                continue
            if fill is None or fill.loading or not has_its_kv(sequence):
                continue
            waits = awaits_token(sequence)
            pages_left = pages_left and standing.free_places > 0 and (waits or self._tails.take(sequence))
            if waits or not pages_left:
                standing.for_a_place += 1
                continue
            self._begin(sequence, fill, now)

    def _begin(self, sequence: Sequence, fill: Fill, now: int) -> None:
        """A request that has pages for its tail has its place, for the first time or again."""
        self._standing.enter(sequence, State.PREFILLING)
        sequence.go_on()
        self._opened.append(sequence)
        self._fills.stop_waiting(fill)
        note_filled(sequence, now)
        self._standing.note_known(sequence)

    def _tell_ready(self, sequence: Sequence, now: int) -> None:
        """A request for chunks is told of each that can be read by whatever is launched from now on."""
        chunks = sequence.composition.chunks
        for chunk in chunks:
            if chunk.held.ready and chunk not in sequence.told:
                sequence.told.add(chunk)
                self._tell(sequence, ChunkReady(chunk))
        if len(sequence.told) == len(chunks) and sequence.fill is not None and not sequence.fill.loading:
            sequence.clock.filled = now
            self._leaving.end(sequence, AllReady(), now)
