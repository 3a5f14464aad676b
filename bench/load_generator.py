"""The load generator of ``bench.serving``: processes of their own, which share sessions first come, first served."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

from bench.serving_load import START_S, Answer, Caller, DocumentKey, Job

UNPACK_S = 0.15  # for a trace to reach every process
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Load:
    """What all processes saw of a job, and the share of a processor that the busiest of them took."""

    answers: list[Answer]
    busy: float


class LoadGenerator:
    """The processes. For ``with``; they share a job's sessions first come, first served."""

    def __init__(self, processes: int) -> None:
        self._next = _SPAWN.Value("q", 0)
        self._known: dict[DocumentKey, str] = {}
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for number in range(processes):
            here, there = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_serve, args=(there, self._next, number, processes), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, job: Job) -> Load:
        """Runs a job in all processes. Raises ``RuntimeError`` if one fails, ``TimeoutError`` if one does not end."""
        self._next.value = job.first
        begin = time.monotonic() + UNPACK_S
        for pipe in self._pipes:
            pipe.send((job, begin, self._known))
        results = []
        for pipe in self._pipes:
            if not pipe.poll(job.limit_s + 2 * START_S):
                raise TimeoutError("a process of the load generator did not end with its job")
            result = pipe.recv()
            if isinstance(result, str):
                raise RuntimeError(f"the load generator failed: {result}")
            results.append(result)
        for _, _, known in results:
            self._known.update(known)
        return Load([answer for answers, *_ in results for answer in answers], max(busy for _, busy, _ in results))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()  # which ends its process
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _serve(pipe: Connection, following: Any, number: int, processes: int) -> None:
    """What a process does: jobs from ``pipe`` until that is closed; ``following`` is the next session for anybody."""

    def taken(end: int) -> Iterator[int]:
        while True:
            with following.get_lock():
                session = following.value
                following.value += 1
            if session >= end:
                return
            yield session

    while True:
        try:
            job, begin, known = pipe.recv()
        except EOFError:
            return
        if job.arrivals is None:
            sessions = taken(job.end)
        else:
            sessions = itertools.islice(range(job.first, job.end), number, None, processes)
        places = job.trace.concurrency // processes + (number < job.trace.concurrency % processes)
        caller = Caller(job, begin, sessions, known)
        worked = time.process_time()
        try:
            asyncio.run(caller.run(places))
        except Exception as error:  # told to the one who gave the job
            pipe.send(f"{type(error).__name__}: {error}")
            return
        busy = (time.process_time() - worked) / max(1e-9, time.monotonic() - begin)
        pipe.send((caller.answers, busy, known))
