"""A running generation: an iterator of deltas, then a result. Abandoning it cancels the RPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from cairn.client.errors import error_from_status
from cairn.client.replies import parse_delta, parse_result
from cairn.client.transport import END, Attempts, CallFailed, Peer, chunk_is_gone, error_from_rpc
from cairn.client.types import Delta, Result
from protos import decode_pb2

StartCall = Callable[[float], Any]  # seconds until the deadline -> the gRPC call


class _Assembly:
    """The events of one stream, put together by answer. Knows no network."""

    def __init__(self, peer: Peer, answers: int) -> None:
        self.results: dict[int, Result] = {}
        self.started = False
        self._answers = answers
        self._peer = peer
        self._deltas: dict[int, list[Delta]] = {}

    @property
    def is_whole(self) -> bool:
        """Whether the final message of every answer has come."""
        return len(self.results) >= self._answers

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

    def end(self) -> None:
        """The stream is over. Raises ``ServerError`` if a final message never came."""
        if not self.is_whole:
            message = "the stream ended before its final message"
            raise error_from_status("INTERNAL", message, self._peer.source, self._peer.request_id)


class _Stream:
    """What both kinds of generation are: a call, its deadline, and what has arrived.

    ``answers`` are expected. ``instead`` is the call to make when the first one finds a chunk gone; ``finished`` is
    told of the result, of several the first.
    """

    def __init__(
        self,
        start: StartCall,
        peer: Peer,
        attempts: Attempts,
        *,
        answers: int = 1,
        instead: StartCall | None = None,
        finished: Callable[[Result], None] = lambda _: None,
    ) -> None:
        self._start = start
        self._instead = instead
        self._finished = finished
        self._peer = peer
        self._attempts = attempts
        self._assembly = _Assembly(peer, answers)
        self._call: Any = start(attempts.remaining_s())
        self._open = True

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
            self._finished(self.result)
        return delta

    def _cancel(self) -> None:
        if self._open:
            self._open = False
            self._call.cancel()

    def _delay_or_raise(self, error: CallFailed) -> float:
        """Seconds until another attempt; raises the error when there is none, or when text was delivered."""
        if self._instead is not None and not self._assembly.started and chunk_is_gone(error):
            self._start, self._instead = self._instead, None
            return 0.0
        delay_s = None if self._assembly.started else self._attempts.delay_after(error)
        if delay_s is None:
            self._open = False
            raise error_from_rpc(error, self._peer) from None
        return delay_s


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
                self._open = False
                self._assembly.end()
                break
            except CallFailed as error:
                if not self._open:  # closed by another thread
                    break
                time.sleep(self._delay_or_raise(error))
                self._call = self._start(self._attempts.remaining_s())
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

    def __init__(self, start: StartCall, peer: Peer, attempts: Attempts, **more: Any) -> None:
        self._loop = asyncio.get_running_loop()
        super().__init__(start, peer, attempts, **more)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        while self._open:
            try:
                event = await self._call.read()
            except CallFailed as error:
                await asyncio.sleep(self._delay_or_raise(error))
                self._call = self._start(self._attempts.remaining_s())
                continue
            except asyncio.CancelledError:
                if not self._open and not _task_is_cancelled():  # closed by another task
                    break
                self._cancel()
                raise
            if event is END:
                self._open = False
                self._assembly.end()
                break
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
            self._loop.call_soon_threadsafe(self._call.cancel)


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
