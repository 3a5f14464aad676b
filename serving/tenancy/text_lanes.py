"""Long texts become tokens one at a time, and prompts of many segments get their keys: both take long in a thread, and
several threads that compute keep the event loop waiting for its turn, once for each of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serving.errors import Overloaded, RequestError

LONG_CHARACTERS = 64 * 1024
MANY_SEGMENTS = 64
WAITING_MAX = 64
WAIT_S = 60.0


class TextLanes:
    """One lane for requests with long texts or many segments, which wait for each other; others pass beside it."""

    def __init__(self, *, waiting_max: int = WAITING_MAX, wait_s: float = WAIT_S) -> None:
        self._free = asyncio.Semaphore(1)
        self._waiting = 0
        self._waiting_max = waiting_max
        self._wait_s = wait_s

    @asynccontextmanager
    async def lane(self, characters: int, segments: int = 1) -> AsyncIterator[None]:
        """Inside the block a request of so many segments, with texts of so many characters in all, may be tokenized.

        Raises ``Overloaded`` if too many wait, or it waited too long.
        """
        if characters <= LONG_CHARACTERS and segments <= MANY_SEGMENTS:
            yield
            return
        await self._enter()
        try:
            yield
        finally:
            self._free.release()

    async def _enter(self) -> None:
        if not self._free.locked():
            await self._free.acquire()  # does not wait
            return
        if self._waiting >= self._waiting_max:
            raise self._refusal(f"{self._waiting} long requests wait already")
        self._waiting += 1
        try:
            await asyncio.wait_for(self._free.acquire(), self._wait_s)
        except TimeoutError:
            raise self._refusal(f"long requests waited {self._wait_s:g} s for each other") from None
        finally:
            self._waiting -= 1

    def _refusal(self, because: str) -> RequestError:
        return Overloaded(
            f"{because}, and those of more than {LONG_CHARACTERS} characters or {MANY_SEGMENTS} segments are "
            "prepared one at a time",
            field="segments",
            remedy="try later, or send token_ids in fewer segments",
            retry_after_s=self._wait_s / 4,
        )
