"""The load generator's processes, which share a job's sessions first come, first served.

They are processes even if there is only one: what shows progress does not disturb what measures.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Self

from cairn.load.answer import Answer, Progress, together
from cairn.load.job import Job
from cairn.load.messages import READY, REPORT_S, STOP, Counter, Result
from cairn.load.target import Known

START_S = 0.05  # for the word to reach every process
CONNECT_S = 120.0  # for the processes to connect, and beyond a job's time to send what they noted


class LoadFailed(Exception):
    """A process of the load generator could not do its job, and why."""


@dataclass(frozen=True)
class Load:
    """What all processes saw of a job: it ``began`` (monotonic) and took ``seconds``; of a processor each of them took
    the share ``busy``."""

    answers: list[Answer]
    began: float = 0.0
    seconds: float = 0.0
    busy: tuple[float, ...] = (0.0,)


class _Told:
    """What the processes say, put together."""

    def __init__(self, pipes: list[Connection]) -> None:
        self.results: list[Result] = []
        self._ready = 0
        self._waiting = set(pipes)
        self._parts = {pipe: Progress() for pipe in pipes}

    def wait_for(self, ready: int, ends_at: float) -> None:
        """Until so many are ready."""
        while self._ready < ready:
            self.read(ends_at)

    def read(self, ends_at: float) -> None:
        """What was said, or nothing after a moment."""
        for pipe in self._waiting.intersection(wait(list(self._waiting), REPORT_S)):
            self._hear(pipe)
        if time.monotonic() > ends_at:
            raise LoadFailed("a process of the load generator did not end with its job")

    def _hear(self, pipe: Any) -> None:
        try:
            said = pipe.recv()
        except (EOFError, OSError):
            raise LoadFailed("a process of the load generator has died") from None
        if isinstance(said, Progress):
            self._parts[pipe] = said
        elif isinstance(said, Result):
            self.results.append(said)
            self._waiting.discard(pipe)
        elif said == READY:
            self._ready += 1
        else:
            raise LoadFailed(said)

    def progress(self) -> Progress:
        """All of theirs; times to first token are given once."""
        now = together(list(self._parts.values()))
        for part in self._parts.values():
            part.firsts_s = []
        return now


class LoadGenerator:
    """The processes. For ``with``.

    Python modules of their own, not children of ``multiprocessing``: these would import what the program began with.
    """

    def __init__(self, processes: int = 1) -> None:
        self._stopped = threading.Event()
        self._known: Known = {}
        self._counter = Counter.new()
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for number in range(processes):
            here, there = socket.socketpair()
            with there:
                ends = str(there.fileno()), str(self._counter.fd), str(number), str(processes)
                argv = [sys.executable, "-m", "cairn.load.worker", *ends]
                kept = (there.fileno(), self._counter.fd)
                # in a session of its own: Ctrl-C is the parent's affair, who asks for what there is
                self._processes.append(subprocess.Popen(argv, pass_fds=kept, start_new_session=True))
            self._pipes.append(Connection(here.detach()))

    def stop(self) -> None:
        """Ends the job that runs; from any thread, and from a signal handler."""
        self._stopped.set()

    def run(self, job: Job, show: Callable[[Progress], None] = lambda _: None) -> Load:
        """Runs a job in all processes; ``show`` is told how far it is. Raises ``LoadFailed`` if one of them fails or
        does not end."""
        self._counter.set(job.first)
        self._stopped.clear()
        self._send((job, self._known))
        told = _Told(self._pipes)
        told.wait_for(len(self._pipes), time.monotonic() + CONNECT_S)
        began = time.monotonic() + START_S
        self._send(began)
        ends_at, stopping = began + job.limit_s + CONNECT_S, False
        while len(told.results) < len(self._pipes):
            told.read(ends_at)
            show(told.progress())
            if self._stopped.is_set() and not stopping:
                self._send(STOP)
                ends_at, stopping = time.monotonic() + CONNECT_S, True
        for result in told.results:
            self._known.update(result.known)
        answers = [answer for result in told.results for answer in result.answers]
        seconds = max(result.ended for result in told.results) - began
        return Load(answers, began, max(0.0, seconds), tuple(result.busy for result in told.results))

    def _send(self, what: object) -> None:
        for pipe in self._pipes:
            pipe.send(what)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()  # which ends its process
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._counter.close()
