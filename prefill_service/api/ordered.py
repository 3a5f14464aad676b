"""Work on several items of a stream at once, results in the stream's order. Knows neither items nor results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


async def in_order(
    items: AsyncIterator[Item], begin: Callable[[Item], Awaitable[asyncio.Task[Result]]], window: int
) -> AsyncGenerator[Result, None]:
    """Yields the results of the tasks that ``begin`` starts, one for each item, in order.

    The next item is read when fewer than ``window`` results are outstanding or unread, and ``begin`` of one item
    ends before that of the next begins. Left early, it cancels what runs.
    """
    room = asyncio.Semaphore(window)
    begun: asyncio.Queue[asyncio.Task[Result] | None] = asyncio.Queue()  # bounded by ``room``

    async def read() -> None:
        try:
            async for item in items:
                await room.acquire()
                begun.put_nowait(await begin(item))
        finally:
            begun.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (task := await begun.get()) is not None:
            yield await task
            room.release()
        await reader  # raises what reading raised
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        while not begun.empty():
            if (left := begun.get_nowait()) is not None:
                left.cancel()
