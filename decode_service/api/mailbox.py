"""One request's events on their way from the device thread to the stream that its caller reads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from decode_service.sequence import Deliveries, Event, Tokens, hand_out

EVENTS_AT_ONCE = 256  # tokens of a slow reader's next message at most: more would hold up everybody's event loop


class Mailbox:
    """Belongs to the event loop: ``put`` and ``take`` are called there. One task takes.

    What comes while the task writes a message waits here and goes into its next one, in order; a task that waits gets
    what comes at once. An answer's length bounds what can be here.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._over = False  # the last event of the request has come

    def put(self, events: list[Event]) -> None:
        """Nothing comes after an event that is not tokens."""
        if self._over:
            return
        self._events += events
        self._over = not isinstance(events[-1], Tokens)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Event]:
        """What has come, or comes next: at least one event, in order, at most ``EVENTS_AT_ONCE``."""
        if not self._events:
            self._waiter = self._loop.create_future()
            await self._waiter
        events = self._events
        if len(events) <= EVENTS_AT_ONCE:
            self._events = deque()
            return list(events)
        return [events.popleft() for _ in range(EVENTS_AT_ONCE)]


def deliver_in(loop: asyncio.AbstractEventLoop) -> Callable[[Deliveries], None]:
    """Brings what a step has for all callers into their event loop, with one wake-up of it.

    Each wake-up lets go of the interpreter, and the device thread would wait to have it back, once for each request.
    """

    def deliver(deliveries: Deliveries) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(hand_out, deliveries)

    return deliver
