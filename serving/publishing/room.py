"""Room in the queue of what is to be written: so many bytes, given out in the order in which they are asked for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future


class Place:
    """``nbytes`` of a queue, until ``give_back``."""

    def __init__(self, room: Room, nbytes: int) -> None:
        self.nbytes = nbytes
        self._room: Room | None = room
        self._lock = threading.Lock()

    def give_back(self) -> None:
        """Ends it. Harmless a second time."""
        with self._lock:
            room, self._room = self._room, None
        if room is not None:
            room.gave_back(self.nbytes)


def given(place: Place) -> Future[Place]:
    """A place as one that was asked for."""
    asked: Future[Place] = Future()
    asked.set_result(place)
    return asked


def give_up(asked: Future[Place]) -> None:
    """Who asked wants it no more, or no longer. Harmless a second time."""
    if not asked.cancel() and asked.exception() is None:
        asked.result().give_back()


class Room:
    """At most ``nbytes_max`` bytes, but for one place that is larger: it gets in when it is alone. Thread-safe."""

    def __init__(self, nbytes_max: int) -> None:
        if nbytes_max < 1:
            raise ValueError(f"nbytes_max: {nbytes_max} must be at least 1")
        self.nbytes_max = nbytes_max
        self._taken = 0
        self._asked: deque[tuple[int, Future[Place]]] = deque()
        self._closed: Exception | None = None
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """Bytes of all places now."""
        return self._taken

    @property
    def waiting(self) -> int:
        """Bytes that are asked for and not given yet."""
        with self._lock:
            return self._waiting()

    def _waiting(self) -> int:
        return sum(nbytes for nbytes, asked in self._asked if not asked.done())

    def take(self, nbytes: int) -> Place | None:
        """A place at once; None if there is no room, or others have asked before. Raises what ``close`` was given."""
        with self._lock:
            if self._closed is not None:
                raise self._closed
            if any(not asked.done() for _, asked in self._asked) or not self._fits(nbytes):
                return None
            self._taken += nbytes
            return Place(self, nbytes)

    def ask(self, nbytes: int) -> Future[Place]:
        """A place when there is room. Who no longer wants it cancels, and gives back what it could not cancel."""
        with self._lock:
            asked = self._line_up(nbytes)
        return self._in_line(asked)

    def ask_behind(self, nbytes: int) -> Future[Place] | None:
        """The same, for who goes on meanwhile; None where as much waits as may be in here."""
        with self._lock:
            waiting = self._waiting()
            if waiting and waiting + nbytes > self.nbytes_max:
                return None
            asked = self._line_up(nbytes)
        return self._in_line(asked)

    def _line_up(self, nbytes: int) -> Future[Place]:
        if self._closed is not None:
            raise self._closed
        asked: Future[Place] = Future()
        self._asked.append((nbytes, asked))
        return asked

    def _in_line(self, asked: Future[Place]) -> Future[Place]:
        asked.add_done_callback(self._gave_up)
        self._give_out()
        return asked

    def _gave_up(self, asked: Future[Place]) -> None:
        """Who gave up is forgotten at once: the head of the line may stand there for long."""
        if asked.cancelled():
            with self._lock:
                self._asked = deque(each for each in self._asked if each[1] is not asked)
            self._give_out()

    def gave_back(self, nbytes: int) -> None:
        """A place has ended."""
        with self._lock:
            self._taken -= nbytes
        self._give_out()

    def close(self, reason: Exception, but: Collection[Future[Place]] = ()) -> None:
        """Nobody gets a place any more ``but`` these: who waits, and who comes, is given ``reason``."""
        kept = set(but)
        with self._lock:
            self._closed = reason
            others = [asked for _, asked in self._asked if asked not in kept]
            refused = [asked for asked in others if asked.set_running_or_notify_cancel()]
            self._asked = deque(each for each in self._asked if each[1] in kept)
        for asked in refused:
            asked.set_exception(reason)

    def _fits(self, nbytes: int) -> bool:
        return self._taken == 0 or self._taken + nbytes <= self.nbytes_max

    def _give_out(self) -> None:
        given: list[tuple[Future[Place], Place]] = []
        with self._lock:
            while self._asked:
                nbytes, asked = self._asked[0]
                if not asked.cancelled() and not self._fits(nbytes):
                    break
                self._asked.popleft()
                if asked.set_running_or_notify_cancel():
                    self._taken += nbytes
                    given.append((asked, Place(self, nbytes)))
        for asked, place in given:
            asked.set_result(place)  # outside the lock: it calls who waits
