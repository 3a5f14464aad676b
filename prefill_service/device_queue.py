"""The one thread that launches device work, and the bounded line of jobs before it. It knows no chunks."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from grpc import StatusCode

from serving.errors import RequestError
from serving.stages import StageTimer

T = TypeVar("T")

RETRY_AFTER_S = 1.0  # what a refused request is told


class DeviceQueue:
    """At most ``jobs_max`` jobs wait or run; the next is refused."""

    def __init__(self, jobs_max: int) -> None:
        self.jobs_max = jobs_max
        self._jobs = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    @property
    def jobs(self) -> int:
        """Jobs that have a place now."""
        return self._jobs

    def take_place(self) -> None:
        """A place in the line, until ``leave_place``. Raises ``RequestError`` (RESOURCE_EXHAUSTED) without one."""
        if self._jobs >= self.jobs_max:
            raise RequestError(
                StatusCode.RESOURCE_EXHAUSTED,
                f"{self._jobs} requests wait or run, at most {self.jobs_max}; try later",
                retry_after_s=RETRY_AFTER_S,
            )
        self._jobs += 1

    def leave_place(self) -> None:
        self._jobs -= 1

    async def run(self, step: Callable[[], T], timer: StageTimer) -> T:
        """Runs ``step`` on the device thread after what was given before; its wait is the stage ``queue``.

        Cancelled, it takes back a step that has not begun, and ends with one that has.
        """
        asked_ns = time.perf_counter_ns()
        context = contextvars.copy_context()

        def begin() -> T:
            timer.add("queue", time.perf_counter_ns() - asked_ns)
            return context.run(step)

        return await ended(self._thread.submit(begin))

    def close(self) -> None:
        """Drops steps that have not begun and waits for the one that has."""
        self._thread.shutdown(wait=True, cancel_futures=True)


async def ended(work: Future[T]) -> T:
    """The result of what a thread was given. Cancelled, it takes back what has not begun, else waits for its end."""
    waiting = asyncio.wrap_future(work)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        if not work.cancel():
            await asyncio.wait([waiting])
        raise
