"""How requests leave the pool: they end, are sent back to the line, or give way to an answer that grows.

Each gives back all that it holds. Who waits for a chunk that nobody fills any more goes back to the line, too. The
pages of who gave way are others' at once: whatever is launched for them comes later on the device's stream. The token
of a step that it was still in reaches it while it waits, and it does not go on before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from decode_service.scheduling import kept
from decode_service.scheduling.sequence import AllReady, Failed, Finished, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from chunk_store.key import ChunkKey
    from decode_service.scheduling.admission import Admission, Fill
    from decode_service.scheduling.fills import Fills
    from decode_service.scheduling.giving_way import GaveWay
    from decode_service.scheduling.sequence import Event, Sequence
    from decode_service.scheduling.standing import Standing
    from decode_service.scheduling.tails import Tails
    from engine.kv.resident import ResidentChunks
    from serving.errors import RequestError


class Leaving:
    """Takes back what requests hold. ``tell`` is given their last events."""

    def __init__(
        self,
        residents: ResidentChunks,
        standing: Standing,
        admission: Admission,
        tails: Tails,
        fills: Fills,
        tell: Callable[[Sequence, Event], None],
    ) -> None:
        self._residents = residents
        self._standing = standing
        self._admission = admission
        self._tails = tails
        self._fills = fills
        self._tell = tell
        self._gave_way: list[tuple[Sequence, GaveWay]] = []

    def end(self, sequence: Sequence, event: Finished | Failed | AllReady, now: int) -> None:
        """Ends a sequence wherever it stands and gives back all it holds. Harmless a second time."""
        if sequence.done:
            return
        if isinstance(event, Finished):
            kept.leave(self._residents, sequence)
        self._standing.enter(sequence, State.ENDED)
        sequence.grammar = None
        sequence.clock.finished = now
        self._tell(sequence, event)
        self._give_back(sequence)

    def give_way(self, sequence: Sequence, why: GaveWay) -> None:
        """Somebody who runs gives up all that it holds of the pool, and waits where it stood."""
        aside = self._tails.put_aside(sequence)
        self._standing.enter(sequence, State.WAITING)
        sequence.give_up(aside=aside)
        self._give_back(sequence)
        self._gave_way.append((sequence, why))

    def take_gave_way(self) -> list[tuple[Sequence, GaveWay]]:
        """Who gave its pages up since the last time, and to what."""
        gave_way, self._gave_way = self._gave_way, []
        return gave_way

    def send_back(self, keys: set[ChunkKey], also: Fill | None = None) -> None:
        """Returns who waits for chunks that nobody fills any more to the queue; their own loads go on."""
        for sequence in self._standing.loading:
            fill = sequence.fill
            if sequence.state is State.LOADING and fill is not None and (fill is also or keys & fill.awaited):
                self._standing.enter(sequence, State.WAITING)
                self._give_back(sequence)

    def abandon(self, error: RequestError, now: int) -> None:
        """Everybody fails; the pool is left as it is. Nothing may come afterwards."""
        for sequence in self._standing.everyone:
            sequence.state, sequence.grammar = State.ENDED, None
            sequence.clock.finished = now
            self._tell(sequence, Failed(error))
            if sequence.fill is not None:
                sequence.fill.drop_claims()
        self._fills.abandon()

    def _give_back(self, sequence: Sequence) -> None:
        """A sequence gives back what it holds; a load that is under way holds its chunks itself."""
        fill, sequence.fill = sequence.fill, None
        self._admission.release(sequence)
        if sequence.done:
            self._tails.forget(sequence)
        self._standing.look_again()
        if fill is not None:
            self.send_back(self._fills.leave(fill))
