"""One thread that puts copies on the streams of a device and sees them end; many threads hand it what to copy.

Threads that read and verify give the interpreter away with each call; a copy is several calls to torch, and made by
each of those threads it would wait for all the others several times: sixteen of them load at a quarter of the speed.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch

from engine.device import current


@dataclass(frozen=True)
class Copy:
    """``launch`` puts it on ``stream``; ``ended`` hears, in the copier's thread, that it is over or how it failed."""

    launch: Callable[[], None]
    ended: Callable[[BaseException | None], None]
    stream: torch.cuda.Stream | None  # None: on the CPU, where a launch returns when all is done


class Copier:
    """Copies in the order in which they come. Its thread begins with the first and ends with this object."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._work: SimpleQueue[Copy | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, copy: Copy) -> None:
        """Returns at once."""
        if self._thread is None:
            self._begin()
        self._work.put(copy)

    def _begin(self) -> None:
        with self._lock:
            if self._thread is None:
                work = (self._work, self._device)  # not this object, which would live as long as the thread
                thread = threading.Thread(target=_run, args=work, name="cairn-copy", daemon=True)
                thread.start()
                weakref.finalize(self, self._work.put, None)
                self._thread = thread


def _run(work: SimpleQueue[Copy | None], device: torch.device) -> None:
    flying: deque[tuple[Copy, torch.cuda.Event]] = deque()
    idle: list[torch.cuda.Event] = []
    stream: torch.cuda.Stream | None = None
    with current(device):
        while (copy := _following(work, flying, idle)) is not None:
            try:
                if copy.stream is not None and copy.stream is not stream:
                    stream = copy.stream
                    torch.cuda.set_stream(stream)
                copy.launch()
                event = _record(copy.stream, idle)
            except BaseException as error:
                copy.ended(error)
            else:
                if event is None:
                    copy.ended(None)
                else:
                    flying.append((copy, event))
            del copy  # it knows who owns this thread's work, who would not end while this waits for more
            while flying and flying[0][1].query():  # type: ignore[no-untyped-call]
                _land(flying, idle)


def _following(
    work: SimpleQueue[Copy | None], flying: deque[tuple[Copy, torch.cuda.Event]], idle: list[torch.cuda.Event]
) -> Copy | None:
    """The next copy to launch; while there is none, waits for those under way. None: there will be no more."""
    while flying:
        try:
            return work.get_nowait()
        except Empty:
            flying[0][1].synchronize()
            _land(flying, idle)
    return work.get()


def _record(stream: torch.cuda.Stream | None, idle: list[torch.cuda.Event]) -> torch.cuda.Event | None:
    if stream is None:
        return None
    event = idle.pop() if idle else torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _land(flying: deque[tuple[Copy, torch.cuda.Event]], idle: list[torch.cuda.Event]) -> None:
    copy, event = flying.popleft()
    idle.append(event)
    copy.ended(None)
