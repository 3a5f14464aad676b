"""A process of the load generator: ``python -m cairn.load.worker``, started by ``cairn.load.processes``."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection

from cairn.load.job import Part
from cairn.load.messages import READY, REPORT_S, STOP, Counter, Result


def serve(pipe: Connection, counter: Counter, number: int, processes: int) -> None:
    """What a process does: jobs from ``pipe`` until that is closed; ``counter`` has the next session for anybody."""
    while True:
        try:
            told = pipe.recv()
        except (EOFError, OSError):
            return
        if not isinstance(told, tuple):  # STOP, for a job that was over
            continue
        job, known = told
        by_turns = itertools.islice(range(job.first, job.end), number, None, processes)
        part = Part(job, _taken(counter, job.end) if job.arrivals is None else by_turns, known)
        places = job.concurrency // processes + (number < job.concurrency % processes)
        try:
            result: Result | str = asyncio.run(_result(part, places, pipe))
        except Exception as error:  # told to the one who gave the job
            result = _words(error)
        try:
            pipe.send(result)
        except OSError:  # who is gone
            return


def _taken(counter: Counter, end: int) -> Iterator[int]:
    while (session := counter.next()) < end:
        yield session


async def _result(part: Part, places: int, pipe: Connection) -> Result:
    """Runs a part once the word is given, and says how far it is; told to stop it stops."""
    stop, begin, loop = asyncio.Event(), asyncio.get_running_loop().create_future(), asyncio.get_running_loop()

    def told() -> None:
        try:
            said = pipe.recv()
        except (EOFError, OSError):  # the parent is gone
            loop.remove_reader(pipe.fileno())
            said = STOP
        if said == STOP:
            stop.set()
        elif not begin.done():
            begin.set_result(said)

    async def word() -> float:
        pipe.send(READY)
        return float(await begin)

    async def report() -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            with suppress(OSError):  # the parent is gone: told() has heard it
                pipe.send(part.progress.taken())

    loop.add_reader(pipe.fileno(), told)
    reporting = asyncio.create_task(report())
    try:
        return await _worked(part, places, word, stop)
    finally:
        reporting.cancel()
        loop.remove_reader(pipe.fileno())


async def _worked(part: Part, places: int, word: Callable[[], Awaitable[float]], stop: asyncio.Event) -> Result:
    """What a part saw, and what of a processor it took from the beginning of the job on."""
    before = [0.0, 0.0]

    async def began() -> float:
        begin = await word()
        before[:] = time.monotonic(), time.process_time()
        return begin

    await part.run(places, began, stop)
    ended = time.monotonic()
    busy = (time.process_time() - before[1]) / max(1e-9, ended - before[0])
    return Result(part.answers, ended, busy, part.known)


def _words(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    end, shared, own, of = map(int, sys.argv[1:])
    serve(Connection(end), Counter(shared), own, of)
