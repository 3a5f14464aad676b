"""Who has borrowed which chunk until when. Thread-safe; chunks of leases that end wait for who may let them go."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from engine.kv.resident import ResidentChunk

LEASES_MAX = 1024


class LeaseEnd(StrEnum):
    """How a lease ends."""

    RETURNED = "returned"
    EXPIRED = "expired"
    RECALLED = "recalled"  # the pool needed the pages
    SESSION_ENDED = "session_ended"


@dataclass(frozen=True)
class _Lease:
    session: str
    chunk: ResidentChunk
    ends_at: float  # by the monotonic clock


class Leases:
    """At most ``leases_max`` leases of ``lease_s`` seconds each.

    A lease is gone from here before its chunk may move: who finds it here knows that the pages were the chunk's until
    then. ``ended`` counts. Chunks of ended leases wait in ``take_freed``; ``freed`` says that some do.
    """

    def __init__(
        self,
        lease_s: float,
        *,
        freed: Callable[[], None],
        ended: Callable[[LeaseEnd], None] = lambda _: None,
        leases_max: int = LEASES_MAX,
    ) -> None:
        self.lease_s = lease_s
        self._leases_max = leases_max
        self._say_freed = freed
        self._count = ended
        self._lock = threading.Lock()
        self._leases: dict[int, _Lease] = {}  # in the order in which they run out
        self._freed: deque[ResidentChunk] = deque()
        self._last = 0

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, session: str, chunk: ResidentChunk) -> int:
        """A new lease, whose chunk is held already; 0 if there are as many as there may be."""
        with self._lock:
            if len(self._leases) >= self._leases_max:
                return 0
            self._last += 1
            self._leases[self._last] = _Lease(session, chunk, time.monotonic() + self.lease_s)
            return self._last

    def give_back(self, session: str, lease: int) -> bool:
        """Ends a lease of a session; whether it had held until now."""
        with self._lock:
            found = self._leases.get(lease)
            if found is None or found.session != session:
                return False
        return bool(self._end([lease], LeaseEnd.RETURNED))

    def end_of(self, session: str) -> None:
        """Nobody is there for the session any more."""
        with self._lock:
            theirs = [number for number, lease in self._leases.items() if lease.session == session]
        self._end(theirs, LeaseEnd.SESSION_ENDED)

    def expire(self) -> float:
        """Ends what has run out; seconds until the next lease does, at most ``lease_s``."""
        now = time.monotonic()
        with self._lock:
            over = [number for number, lease in self._leases.items() if lease.ends_at <= now]
        self._end(over, LeaseEnd.EXPIRED)
        with self._lock:
            return min((lease.ends_at - now for lease in self._leases.values()), default=self.lease_s)

    def recall(self) -> bool:
        """Ends every lease, whatever its borrower does: it will find out before it uses what it copied."""
        with self._lock:
            every = list(self._leases)
        return bool(self._end(every, LeaseEnd.RECALLED))

    def take_freed(self) -> list[ResidentChunk]:
        """Chunks whose leases have ended since the last time, once for each lease."""
        with self._lock:
            freed = list(self._freed)
            self._freed.clear()
            return freed

    def _end(self, numbers: list[int], how: LeaseEnd) -> int:
        """How many of them held until now."""
        with self._lock:
            ended = [lease for number in numbers if (lease := self._leases.pop(number, None)) is not None]
            self._freed.extend(lease.chunk for lease in ended)
        for _ in ended:
            self._count(how)
        if ended:
            self._say_freed()
        return len(ended)
