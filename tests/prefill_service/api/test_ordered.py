"""Results come in the stream's order, within the window, and nothing is left running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefill_service.api.ordered import in_order


class Work:
    """Items are numbers; each result waits for as many turns of the loop as ``turns`` says of it."""

    def __init__(self, turns: list[int]) -> None:
        self.turns, self.begun, self.running, self.most = turns, 0, 0, 0
        self.tasks: list[asyncio.Task[int]] = []

    async def items(self) -> AsyncIterator[int]:
        for number in range(len(self.turns)):
            yield number

    async def begin(self, number: int) -> asyncio.Task[int]:
        assert self.begun == number, "begun in order, one after another"
        await asyncio.sleep(0)
        self.begun += 1
        self.tasks.append(asyncio.create_task(self._result(number)))
        return self.tasks[-1]

    async def _result(self, number: int) -> int:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(self.turns[number]):
                await asyncio.sleep(0)
        finally:
            self.running -= 1
        return number


@settings(max_examples=100, deadline=None)
@given(turns=st.lists(st.integers(0, 9), max_size=12), window=st.integers(1, 4))
def test_any_durations_give_the_streams_order_within_the_window(turns: list[int], window: int) -> None:
    async def main() -> None:
        work, ahead = Work(turns), []
        async with aclosing(in_order(work.items(), work.begin, window)) as results:
            seen = []
            async for result in results:
                seen.append(result)
                ahead.append(work.begun - len(seen))
        assert seen == list(range(len(turns)))
        assert work.most <= window and max(ahead, default=0) < window

    asyncio.run(asyncio.wait_for(main(), 30))


def test_results_run_side_by_side() -> None:
    async def main() -> None:
        work = Work([20] * 4)
        assert [r async for r in in_order(work.items(), work.begin, 4)] == [0, 1, 2, 3]
        assert work.most == 4

    asyncio.run(asyncio.wait_for(main(), 30))


def test_left_early_it_cancels_what_runs() -> None:
    async def main() -> None:
        work = Work([0, 10**9, 10**9, 10**9])
        results = in_order(work.items(), work.begin, 3)
        assert await anext(results) == 0
        while len(work.tasks) < 3:
            await asyncio.sleep(0)
        await results.aclose()
        await asyncio.gather(*work.tasks, return_exceptions=True)
        assert work.running == 0 and all(task.cancelled() for task in work.tasks[1:])

    asyncio.run(asyncio.wait_for(main(), 30))


def test_what_reading_raises_comes_behind_the_results() -> None:
    async def main() -> None:
        work = Work([3, 0, 0])

        async def broken() -> AsyncIterator[int]:
            yield 0
            yield 1
            raise ConnectionError("the caller is gone")

        seen = []
        with pytest.raises(ConnectionError):
            async for result in in_order(broken(), work.begin, 4):
                seen.append(result)
        assert seen == [0, 1]

    asyncio.run(asyncio.wait_for(main(), 30))
