"""Until when requests want to be begun: whose query was not begun by then fails, rather than be answered too late.

All answers to one prompt begin with the first of them. No clock: the times come with the events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.errors import DeadlineExceeded

if TYPE_CHECKING:
    from decode_service.scheduling.sequence import Sequence


def not_started() -> DeadlineExceeded:
    """What the caller is told whose turn did not come."""
    return DeadlineExceeded("the request was not begun in time", field="start_within_s", remedy="allow more time")


class Starts:
    """Requests that are to be begun by a certain time, and were not begun yet."""

    def __init__(self) -> None:
        self._waiting: set[Sequence] = set()
        self._earliest = 0

    def add(self, sequence: Sequence) -> None:
        """A request comes, with a limit or without."""
        if sequence.start_by:
            self._waiting.add(sequence)
            self._look()

    def started(self, sequence: Sequence) -> None:
        """A query is begun, and with it the other answers to the same prompt."""
        if sequence in self._waiting:
            self._waiting = {other for other in self._waiting if other.prompt is not sequence.prompt}
            self._look()

    def forget(self, sequence: Sequence) -> None:
        """A request has ended."""
        if sequence in self._waiting:
            self._waiting.discard(sequence)
            self._look()

    def late(self, now: int) -> list[Sequence]:
        """Whose time is over, in the order in which they came."""
        if not self._waiting or now < self._earliest:
            return []
        late = [sequence for sequence in self._waiting if sequence.start_by <= now]
        return sorted(late, key=lambda sequence: sequence.clock.submitted)

    def _look(self) -> None:
        self._earliest = min((sequence.start_by for sequence in self._waiting), default=0)
