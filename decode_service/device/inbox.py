"""What others have the device thread do: functions that it runs between two launches, in the order they came in."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from serving.errors import Unavailable

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5


class Inbox:
    """``put`` and ``call`` from any thread; ``run`` and ``close`` in the device thread."""

    def __init__(self) -> None:
        self._functions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closed_because = ""  # guarded by the lock, as is the order of what ``call`` brings
        self._lock = threading.Lock()

    def put(self, function: Callable[[], None]) -> None:
        """What comes after the end is nobody's."""
        self._functions.put(function)

    def call(self, function: Callable[[], None]) -> None:
        """What comes before the end is run. Raises ``Unavailable`` afterwards."""
        with self._lock:
            if self._closed_because:
                raise Unavailable(self._closed_because)
            self._functions.put(function)

    def run(self, *, idle: bool) -> None:
        """Runs all that is there; waits a while for something if the thread is ``idle``."""
        try:
            while True:
                self._functions.get(block=idle, timeout=IDLE_WAIT_S if idle else None)()
                idle = False
        except queue.Empty:
            return

    def close(self, because: str) -> None:
        """From here on nothing enters; what is in it, requests among it, is taken out."""
        with self._lock:
            self._closed_because = because
        while True:
            try:
                self._functions.get_nowait()()
            except queue.Empty:
                return
            except Exception:
                log.exception("a last call failed")
