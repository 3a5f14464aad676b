"""How long who waits has to expect to wait. Knows no requests and no tenants."""

from __future__ import annotations

import time
from collections.abc import Callable

FORGET = 1 / 128  # of what was seen, with each request that ends
TIMES_MIN = 2.0  # however long they take: as many as run may wait so many times over


class Waits:
    """How long requests run, by how many run and how many end: what is behind them in the line waits for that.

    Those that run now count with the time they have taken, so that it is noticed at once when all become slower.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running = 0
        self._ended = 0.0
        self._taken_s = 0.0  # by all that ran, one beside the other; forgotten as ``_ended`` is
        self._since = clock()

    def began(self) -> None:
        self._count(1)

    def put_back(self) -> None:
        """One that ran waits again."""
        self._count(-1)

    def ended(self) -> None:
        self._count(-1)
        self._ended = self._ended * (1 - FORGET) + 1
        self._taken_s *= 1 - FORGET

    def expected_s(self, place: int) -> float:
        """Until the ``place``-th in the line runs; 0 if nothing runs, or has run long enough to say."""
        if not self._running:
            return 0.0
        self._count(0)
        return place * self._taken_s / (self._ended + self._running / 2) / self._running

    def too_many(self, place: int, most_s: float) -> bool:
        """Whether the ``place``-th would have to wait longer than ``most_s``, and for more than twice all that run."""
        return place > TIMES_MIN * self._running and self.expected_s(place) > most_s

    def _count(self, more: int) -> None:
        now = self._clock()
        self._taken_s += self._running * (now - self._since)
        self._since = now
        self._running += more
