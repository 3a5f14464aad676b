"""The events of a request's answers on their way from the device thread to the stream that its caller reads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from decode_service.scheduling.sequence import Deliveries, Event, Tokens, hand_out

EVENTS_AT_ONCE = 256  # tokens of a slow reader's next message at most: more would hold up everybody's event loop


class Mailbox:
    """Belongs to the event loop: ``put`` and ``take`` are called there. One task takes.

    What comes while the task writes a message waits here and goes into its next one, in order; a task that waits gets
    what comes at once. The length of the ``answers`` bounds what can be here.
    """

    def __init__(self, answers: int = 1) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: list[deque[Event]] = [deque() for _ in range(answers)]
        self._over = [False] * answers  # of which answers the last event has come
        self._waiter: asyncio.Future[None] | None = None

    def put(self, events: list[Event], answer: int = 0) -> None:
        """Nothing comes of an answer after an event that is not tokens."""
        if self._over[answer]:
            return
        self._events[answer] += events
        self._over[answer] = not isinstance(events[-1], Tokens)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self, event: Event) -> None:
        """The last event of every answer that is not over."""
        for answer in range(len(self._over)):
            self.put([event], answer)

    async def take(self) -> list[tuple[int, list[Event]]]:
        """What has come, or comes next, by answer: of one at least, in order, at most ``EVENTS_AT_ONCE`` of each."""
        if not any(self._events):
            self._waiter = self._loop.create_future()
            await self._waiter
        return [(answer, self._taken(answer)) for answer, events in enumerate(self._events) if events]

    def _taken(self, answer: int) -> list[Event]:
        events = self._events[answer]
        if len(events) <= EVENTS_AT_ONCE:
            self._events[answer] = deque()
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
