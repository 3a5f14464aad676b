"""Answers while their caller is there: server-sent events, and work that ends when the caller has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Self, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cairn.client.errors import CairnError
from gateway.errors import HttpError, http_error

WRITE_S = 30.0  # for one event to be taken
DONE = "data: [DONE]\n\n"

T = TypeVar("T")
Events = AsyncGenerator[str, None]


def event(value: dict[str, Any], name: str = "") -> str:
    """One server-sent event."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` gives; it is cancelled when the caller goes. Raises ``ClientDisconnect`` then.

    For requests whose body has been read: what else comes from the caller is that it went.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Events as they come. What fails once they have begun is an event too, the last one."""

    media_type = "text/event-stream"

    def __init__(self, first: str, events: Events) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events

    @classmethod
    async def begin(cls, receive: Receive, events: Events) -> Self:
        """Waits for the first event: what fails until then is an answer with a status of its own."""
        try:
            return cls(await unless_gone(receive, _next(events)), events)
        except BaseException:
            await events.aclose()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._write(send))
        finally:
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await _send(send, self._first)
        try:
            async for words in self._events:
                await _send(send, words)
        except CairnError as error:
            await _send(send, event(http_error(error).body()))
        except HttpError as error:
            await _send(send, event(error.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _next(events: Events) -> str:
    return await anext(events)


async def _send(send: Send, words: str) -> None:
    """Raises ``ClientDisconnect`` for a caller that does not take what is sent."""
    try:
        async with asyncio.timeout(WRITE_S):
            await send({"type": "http.response.body", "body": words.encode(), "more_body": True})
    except TimeoutError:
        raise ClientDisconnect from None
