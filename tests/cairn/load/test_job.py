"""When a job asks: places, arrivals, ends; beside a target that does what it is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from cairn.load.answer import CUT, NOT_SENT, OK, Answer
from cairn.load.job import Job, Part, poisson
from cairn.load.workload import Listed, Request

TALK = Listed("talk", (), tuple((Request((), f"{n}", 3), Request((), f"{n}, too", 2)) for n in range(6)))


@dataclass
class Told:
    """A target: ``becomes`` says what becomes of a request, whose query it is given."""

    becomes: Callable[[str], Any]
    asked: list[str] = field(default_factory=list)
    running: int = 0
    most: int = 0

    @asynccontextmanager
    async def open(self, workload: Any, known: Any, heard: Any) -> AsyncIterator[Told]:
        self.heard = heard
        yield self

    def session(self, number: int, turns: int) -> Told:
        assert turns == 2
        return self

    async def ask(self, request: Request, max_tokens: int, answer: Answer) -> None:
        self.asked.append(f"{request.query} {max_tokens}")
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            status = await self.becomes(str(request.query))
            answer.times.append(time.monotonic())
            answer.counts.append(max_tokens)
            self.heard(answer, max_tokens)
            answer.status = status
        finally:
            self.running -= 1


async def fine(_: str) -> str:
    await asyncio.sleep(0)
    return OK


def run(target: Told, places: int = 3, stop_when: Callable[[Told], bool] | None = None, **more: Any) -> Part:
    job = Job(target, TALK, 0, 6, **more)
    part = Part(job, iter(range(job.first, job.end)), {})

    async def begin() -> float:
        return time.monotonic()

    async def main() -> None:
        stop = asyncio.Event()
        running = asyncio.create_task(part.run(places, begin, stop))
        deadline = time.monotonic() + 60
        while stop_when and not stop.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
            if stop_when(target):
                stop.set()
        await running

    asyncio.run(main())
    return part


def test_every_session_is_asked_turn_by_turn_so_many_at_a_time() -> None:
    target = Told(fine)
    part = run(target)
    assert sorted(target.asked) == sorted([*(f"{n} 3" for n in range(6)), *(f"{n}, too 2" for n in range(6))])
    assert target.most == 3 and {answer.status for answer in part.answers} == {OK}
    for number in range(6):
        first, second = (answer for answer in part.answers if answer.session == number)
        assert (first.turn, second.turn) == (0, 1) and second.asked >= first.times[-1] and first.sent >= first.asked
    progress = part.progress.taken()
    assert (progress.running, progress.answered, progress.failed, progress.tokens) == (0, 12, 0, 30)
    assert len(progress.firsts_s) == 12 and part.progress.taken().firsts_s == []
    short = Told(fine)
    run(short, max_tokens=1)
    assert {words[-1] for words in short.asked} == {"1"}


def test_a_request_that_fails_ends_its_session_and_no_other() -> None:
    async def becomes(query: str) -> str:
        return "UNAVAILABLE" if query == "2" else OK

    part = run(Told(becomes))
    assert [answer.status for answer in part.answers if answer.session == 2] == ["UNAVAILABLE"]
    assert sum(answer.status == OK for answer in part.answers) == 10 and part.progress.failed == 1


def test_those_who_arrive_wait_from_when_they_were_due_however_busy_it_is() -> None:
    release = asyncio.Event()

    async def becomes(query: str) -> str:
        if target.running == 6:
            release.set()
        await release.wait()
        return OK

    target, due = Told(becomes), (0.0, 0.01, 0.02, 0.03, 0.04, 0.1)
    part = run(target, places=1, arrivals=due)
    first = {answer.session: answer for answer in part.answers if answer.turn == 0}
    assert [first[n].asked - first[0].asked for n in range(6)] == pytest.approx(due, abs=1e-9)
    assert all(answer.sent >= answer.asked for answer in part.answers) and target.most == 6


def test_who_arrives_while_too_many_run_is_counted_as_not_sent() -> None:
    async def becomes(_: str) -> str:
        await asyncio.sleep(60)
        return OK

    target = Told(becomes)
    part = run(target, 1, lambda _: target.running == 2, arrivals=(0.0,) * 6, in_flight_max=2)
    statuses = [answer.status for answer in part.answers]
    assert statuses.count(NOT_SENT) == 4 and statuses.count(CUT) == 2 and target.most == 2


def test_what_runs_at_the_end_is_cut_off_and_counts_so_far() -> None:
    async def becomes(query: str) -> str:
        if query.endswith("too"):
            await asyncio.sleep(60)
        return OK

    part = run(Told(becomes), stop_when=lambda target: sum("too" in each for each in target.asked) == 3)
    assert [answer.status for answer in part.answers if answer.turn] == [CUT] * 3
    assert [answer.status for answer in part.answers if not answer.turn] == [OK] * 3
    limited = run(Told(becomes), limit_s=0.3)
    assert {answer.status for answer in limited.answers if answer.turn} == {CUT}


def test_no_request_begins_after_the_time() -> None:
    async def becomes(_: str) -> str:
        await asyncio.sleep(0.3)
        return OK

    part = run(Told(becomes), places=2, duration_s=0.2)
    assert [(answer.turn, answer.status) for answer in part.answers] == [(0, OK)] * 2


def test_a_target_that_raises_is_an_error_of_the_job() -> None:
    async def becomes(_: str) -> str:
        raise RuntimeError("broken")

    with pytest.raises(BaseExceptionGroup):
        run(Told(becomes))


def test_arrivals_come_at_the_rate_that_was_asked_for() -> None:
    for size in (1, 6):
        times = poisson("a", 10.0, [size] * 600)
        assert list(times) == sorted(times) and 0.8 < 600 * size / times[-1] / 10.0 < 1.25
        assert times == poisson("a", 10.0, [size] * 600) != poisson("b", 10.0, [size] * 600)
