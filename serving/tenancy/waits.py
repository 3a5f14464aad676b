"""How long who waits has to expect to wait. Knows no requests and no tenants."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

USUAL_S = 10.0
FORGET = 1 / 128  # of what was seen, with each request that ends


class Waits:
    """How long requests run, and so how soon one of ``most`` places to run becomes free.

    Those that run now count with the time they have taken, so that it is noticed at once when all become slower.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._running = 0
        self._began: deque[float] = deque()  # when, of those that run, if they end in that order
        self._ended = 0.0
        self._taken_s = 0.0  # by all that ran, one beside the other; forgotten as ``_ended`` is
        self._since = clock()

    def began(self) -> None:
        self._count(1)
        self._began.append(self._since)

    def put_back(self) -> None:
        """One that ran waits again."""
        self._count(-1)
        if self._began:
            self._began.pop()

    def ended(self) -> None:
        self._count(-1)
        if self._began:
            self._began.popleft()
        self._ended = self._ended * (1 - FORGET) + 1
        self._taken_s *= 1 - FORGET

    @property
    def run_s(self) -> float:
        """How long a request runs; 0 if none has."""
        self._count(0)
        seen = self._ended + self._running / 2
        return self._taken_s / seen if seen else 0.0

    def expected_s(self, place: int) -> float:
        """Until the ``place``-th in the line runs: as if requests ended evenly, or where those that run began together
        as the first of them come to their end."""
        behind, run_s = place - max(0, self._most - self._running), self.run_s
        if behind <= 0:
            return 0.0
        evenly = behind * run_s / self._most
        if not self._began:
            return evenly
        rounds, at = divmod(behind - 1, len(self._began))
        return max(evenly, self._began[at] + (rounds + 1) * run_s - self._since)

    def too_many(self, place: int, most_s: float | None = None) -> bool:
        """Whether the ``place``-th would have to wait longer than ``most_s``; by default, longer than ``USUAL_S`` and
        than a request runs: as many as can run may wait, however slow they are."""
        return self.expected_s(place) > (max(USUAL_S, self.run_s) if most_s is None else most_s)

    def _count(self, more: int) -> None:
        now = self._clock()
        self._taken_s += self._running * (now - self._since)
        self._since = now
        self._running += more
