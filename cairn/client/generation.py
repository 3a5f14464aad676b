"""A running generation: an iterator of deltas, then a result. Abandoning it cancels the RPC."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

from cairn.client.answers import Delta, Result
from cairn.client.errors import CairnError, error_from_status
from cairn.client.replicas import Route
from cairn.client.replies import parse_delta, parse_result
from cairn.client.transport import END, Attempts, CallFailed, Peer, chunk_is_gone
from protos import decode_pb2

StartCall = Callable[[float], Any]  # seconds until the deadline -> the gRPC call


class _Assembly:
    """The events of one stream, put together by answer. Knows no network."""

    def __init__(self, answers: int) -> None:
        self.results: dict[int, Result] = {}
        self.started = False
        self._answers = answers
        self._deltas: dict[int, list[Delta]] = {}

    @property
    def is_whole(self) -> bool:
        """Whether the final message of every answer has come."""
        return len(self.results) >= self._answers

    @property
    def tokens(self) -> int:
        """That have come, of all answers."""
        return sum(len(delta.token_ids) for deltas in self._deltas.values() for delta in deltas)

    def add(self, event: decode_pb2.GenerateResponse) -> Delta | None:
        """The delta in this event, or None for a final message, whose result it keeps."""
        self.started = True
        if event.WhichOneof("event") == "complete":
            index = event.complete.index
            self.results[index] = parse_result(event.complete, self._deltas.get(index, []))
            return None
        delta = parse_delta(event.delta)
        self._deltas.setdefault(delta.index, []).append(delta)
        return delta

    def end(self, peer: Peer) -> None:
        """The stream is over. Raises ``ServerError`` if a final message never came."""
        if not self.is_whole:
            message = "the stream ended before its final message"
            raise error_from_status("INTERNAL", message, peer.source, peer.request_id)


class _Stream:
    """What both kinds of generation are: a call, its deadline, and what has arrived.

    ``start`` makes a call at a replica of its ``route``; ``answers`` are expected. ``instead`` is the call to make when
    the first one finds a chunk gone; ``finished`` is told of the result, of several the first.
    """

    def __init__(
        self,
        start: StartCall,
        route: Route,
        attempts: Attempts,
        *,
        answers: int = 1,
        instead: StartCall | None = None,
        finished: Callable[[Result], None] = lambda _: None,
    ) -> None:
        self._start = start
        self._instead = instead
        self._finished = finished
        self._route = route
        self._attempts = attempts
        self._assembly = _Assembly(answers)
        self._call: Any = None
        self._open = True
        self._leaving = False  # its replica hangs: nothing is taken from there any more
        self._lock = threading.RLock()
        route.on_hang(self._leave)
        self._begin()

    @property
    def result(self) -> Result:
        """The result, of several the first. Raises ``RuntimeError`` before the stream has been read to its end."""
        return self.results[0]

    @property
    def results(self) -> list[Result]:
        """Of ``n`` answers, in their order. Raises ``RuntimeError`` before the stream has been read to its end."""
        if not self._assembly.is_whole:
            raise RuntimeError("no result yet: read the stream to its end, or call finish()")
        return [result for _, result in sorted(self._assembly.results.items())]

    def _add(self, event: decode_pb2.GenerateResponse) -> Delta | None:
        """The delta in an event; of an answer's last one, None."""
        delta = self._assembly.add(event)
        if delta is None and self._assembly.is_whole:
            self._route.finished(self.result)
            self._finished(self.result)
        return delta

    def _begin(self) -> None:
        """Makes the call, unless it was closed meanwhile. Raises ``CairnError`` where no replica may be used."""
        with self._lock:
            if not self._open:
                return
            try:
                self._call = self._start(self._attempts.remaining_s())
            except BaseException:
                self._close()
                raise

    def _close(self) -> None:
        self._open = False
        self._route.over()

    def _cancel(self) -> None:
        with self._lock:
            if not self._open:
                return
            self._close()
        if self._call is not None:
            self._call.cancel()

    def _leave(self) -> None:
        """The replica hangs: the call is made elsewhere unless something of the answer has come."""
        with self._lock:
            if self._leaving or self._assembly.started or not self._open or self._call is None:
                return
            self._leaving = True
        self._call.cancel()

    def _has_left(self) -> bool:
        """Whether what comes from the call is not to be taken any more; else the answer has begun."""
        with self._lock:
            left, self._leaving = self._leaving, False
            self._assembly.started = not left
        if left:
            self._route.moves()
        return left

    def _delay_or_raise(self, error: CallFailed) -> float:
        """Seconds until another attempt; raises the error when there is none, or when text was delivered."""
        if self._assembly.started:
            self._close()
            raise self._route.broken(error, self._assembly.tokens) from None
        if self._leaving and self._has_left():
            return 0.0
        if self._instead is not None and chunk_is_gone(error):
            self._start, self._instead = self._instead, None
            return 0.0
        try:
            return self._route.delay_or_raise(error, self._attempts)
        except CairnError:
            self._close()
            raise


class Generation(_Stream):
    """Deltas as they arrive; ``result`` after the last. Closing it, leaving its ``with`` block or dropping it
    cancels the request. Reading raises ``CairnError``."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        while self._open:
            try:
                event = next(self._call)
            except StopIteration:
                self._close()
                self._assembly.end(self._route.peer)
                break
            except CallFailed as error:
                if not self._open:  # closed by another thread
                    break
                time.sleep(self._delay_or_raise(error))
                self._begin()
                continue
            if not self._assembly.started and self._has_left():
                self._begin()
                continue
            delta = self._add(event)
            if delta is not None:
                return delta
        raise StopIteration

    def finish(self) -> Result:
        """Read what is left and return the result."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """Cancel the request unless it is over."""
        self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self.close()


class AsyncGeneration(_Stream):
    """The same for an event loop: ``async for``, ``await finish()``, ``async with`` or ``await aclose()``."""

    def __init__(
        self,
        start: StartCall,
        route: Route,
        attempts: Attempts,
        *,
        known: Callable[[], Awaitable[None]] | None = None,
        **more: Any,
    ) -> None:
        """What ``known`` gives is waited for before the call is made, in a task; it has a deadline of its own."""
        self._loop = asyncio.get_running_loop()
        self._known = known
        self._starting: asyncio.Task[None] | None = None
        super().__init__(start, route, attempts, **more)

    def _begin(self) -> None:
        known, self._known = self._known, None
        if known is None:
            super()._begin()
        else:
            self._starting = asyncio.create_task(self._begin_after(known))
            self._starting.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may ask for it

    async def _begin_after(self, known: Callable[[], Awaitable[None]]) -> None:
        await known()
        if self._open:
            super()._begin()

    async def _started(self) -> None:
        starting, self._starting = self._starting, None
        if starting is None:
            return
        try:
            await starting
        except asyncio.CancelledError:
            self._cancel()
            raise

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        await self._started()
        while self._open:
            try:
                event = await self._call.read()
            except CallFailed as error:
                await asyncio.sleep(self._delay_or_raise(error))
                self._begin()
                continue
            except asyncio.CancelledError:
                if self._leaving and self._open and not _task_is_cancelled() and self._has_left():
                    self._begin()
                    continue
                if not self._open and not _task_is_cancelled():  # closed by another task
                    break
                self._cancel()
                raise
            if event is END:
                self._close()
                self._assembly.end(self._route.peer)
                break
            if not self._assembly.started and self._has_left():
                self._begin()
                continue
            delta = self._add(event)
            if delta is not None:
                return delta
        raise StopAsyncIteration

    async def finish(self) -> Result:
        """Read what is left and return the result."""
        async for _ in self:
            pass
        return self.result

    async def aclose(self) -> None:
        """Cancel the request unless it is over."""
        self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # The garbage collector may run in another thread, and after the loop has ended.
        if getattr(self, "_open", False) and not self._loop.is_closed():
            if self._call is not None:
                self._loop.call_soon_threadsafe(self._call.cancel)
            self._loop.call_soon_threadsafe(self._route.over)


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
