"""A job: which sessions are asked, whom, and when; and one process' part in it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random

from cairn.load.answer import NOT_SENT, OK, Answer, Progress
from cairn.load.target import Caller, Conversation, Known, Target
from cairn.load.workload import Request, Workload

IN_FLIGHT_MAX = 4096  # sessions of one process, however many arrive


@dataclass(frozen=True)
class Job:
    """Sessions ``first`` to ``end`` of a workload.

    With ``arrivals`` (seconds after the beginning, one a session) a session begins when it arrives, without them as
    soon as one of ``concurrency`` places is free. No request begins ``duration_s`` after the beginning, and what runs
    after ``limit_s`` is cut off.
    """

    target: Target
    workload: Workload
    first: int
    end: int
    concurrency: int = 1
    arrivals: Sequence[float] | None = None
    duration_s: float | None = None
    limit_s: float = 300.0
    max_tokens: int | None = None  # instead of each request's own
    in_flight_max: int = IN_FLIGHT_MAX


class Part:
    """One process' part of a job. ``known``: ids of documents, which it adds to."""

    def __init__(self, job: Job, sessions: Iterator[int], known: Known) -> None:
        self.answers: list[Answer] = []
        self.progress = Progress()
        self.known = known
        self._job, self._sessions = job, sessions
        self._begin = 0.0
        self._in_flight = 0

    async def run(self, places: int, word: Callable[[], Awaitable[float]], stop: asyncio.Event) -> None:
        """Connects, waits for the ``word`` when to begin, and asks until all is asked, the time is over or ``stop`` is
        set; ``places`` sessions at a time unless they arrive by themselves."""
        async with self._job.target.open(self._job.workload, self.known, self.progress.heard) as caller:
            self._begin = await word()
            await asyncio.sleep(max(0.0, self._begin - time.monotonic()))
            arriving = self._job.arrivals is not None
            asking = asyncio.create_task(self._arriving(caller) if arriving else self._placed(caller, places))
            stopped = asyncio.create_task(stop.wait())
            left_s = self._begin + self._job.limit_s - time.monotonic()
            try:
                await asyncio.wait({asking, stopped}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopped.cancel()
                asking.cancel()
            with suppress(asyncio.CancelledError):  # what was cut off
                await asking

    async def _placed(self, caller: Caller, places: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(places):
                tasks.create_task(self._place(caller))

    async def _place(self, caller: Caller) -> None:
        for session in self._sessions:
            if self._is_over():
                return
            await self._converse(caller, session, None)

    async def _arriving(self, caller: Caller) -> None:
        async with asyncio.TaskGroup() as tasks:
            for session in self._sessions:
                due = self._due(session)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if self._in_flight < self._job.in_flight_max:
                    self._in_flight += 1
                    tasks.create_task(self._arrived(caller, session, due))
                else:
                    self.answers.append(Answer(session, 0, due, status=NOT_SENT))
                    self.progress.failed += 1

    async def _arrived(self, caller: Caller, session: int, due: float) -> None:
        try:
            await self._converse(caller, session, due)
        finally:
            self._in_flight -= 1

    def _due(self, session: int) -> float:
        assert self._job.arrivals is not None
        return self._begin + self._job.arrivals[session - self._job.first]

    async def _converse(self, caller: Caller, session: int, due: float | None) -> None:
        """A session's requests. One that fails ends it: what would follow has no history."""
        requests = self._job.workload.session(session)
        conversation = caller.session(session, len(requests))
        for turn, request in enumerate(requests):
            if turn and self._is_over():
                return
            answer = Answer(session, turn, time.monotonic() if due is None or turn else due)
            if not await self._asked(conversation, request, answer):
                return

    async def _asked(self, conversation: Conversation, request: Request, answer: Answer) -> bool:
        """Asks one thing; whether that was answered."""
        self.answers.append(answer)
        self.progress.began()
        answer.sent = time.monotonic()
        try:
            await conversation.ask(request, self._job.max_tokens or request.max_tokens, answer)
        finally:
            self.progress.over(answer)
        return answer.status == OK

    def _is_over(self) -> bool:
        limit_s = self._job.duration_s
        return limit_s is not None and time.monotonic() >= self._begin + limit_s


def poisson(seed: str, rate: float, sizes: Sequence[int]) -> tuple[float, ...]:
    """When each session arrives (s), of so many requests each, at ``rate`` requests a second; seeded."""
    random, at, times = Random(seed), 0.0, []
    for size in sizes:
        at += random.expovariate(rate / size)
        times.append(at)
    return tuple(times)
