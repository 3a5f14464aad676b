"""One call's messages as its handler sees them: read and parsed under bounds and deadlines, written under deadlines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.protobuf.message import Message

from serving.errors import Cancelled, DeadlineExceeded, InvalidRequest
from serving.rpc.open_calls import CallKind, CallLimits, OpenCall
from serving.rpc.parsing import parse

Parse = Callable[[bytes], Any]
END: Any = cast(Any, grpc.aio).EOF  # the stubs lack it


class MessageKinds:
    """The request message of every method."""

    def __init__(self, by_method: Mapping[str, type[Message]]) -> None:
        self._by_method = by_method

    def of(self, method: str, handler: Any, nbytes_max: int) -> Parse:
        """How to read a request of ``method``; the handler's own way where the message is not known."""
        kind = self._by_method.get(method)
        if kind is None:
            own: Parse = handler.request_deserializer
            return own
        return lambda raw: parse(kind, raw, nbytes_max)


@dataclass
class ClientStream:
    """The requests of a call, one after another (it is their asynchronous iterator), and the writing of its replies.

    A ``streaming`` call gets one reply for each request: it waits for its client when all that came is answered.
    """

    call: OpenCall
    context: Any
    limits: CallLimits
    parse: Parse
    streaming: bool
    _reading: bool = False
    _read: int = 0
    _written: int = 0
    _untaken: DeadlineExceeded | None = None  # what a reply that is not taken ends the call with

    async def only(self) -> Any:
        """The message of a call that sends one. Raises ``RequestError`` without it."""
        raw = await self._next()
        if raw is None:
            raise InvalidRequest("missing; the call ended without one", field="message")
        return self.parse(raw)

    def __aiter__(self) -> ClientStream:
        return self

    async def __anext__(self) -> Any:
        raw = await self._next()
        if raw is None:
            raise StopAsyncIteration
        return self.parse(raw)

    async def write(self, reply: Any) -> None:
        """Returns when grpc has taken the reply, which it does while the client makes room for it."""
        if self._untaken is None:  # once: a stream has thousands of replies
            self._untaken = DeadlineExceeded(
                f"a reply was not taken within {self.limits.write_s:g} s", remedy="read the stream while it runs"
            )
        self.call.waits(self.limits.write_s, self._untaken)
        if not self._written:  # alone, so that a status can follow a first reply that is never taken
            await self.context.send_initial_metadata(())
        await self.context.write(reply)
        self._written += 1
        self._resume()

    async def _next(self) -> bytes | None:
        """The next message as it came; None after the last."""
        self._reading = True
        self._resume()
        try:
            raw = await self.context.read()
        finally:
            self._reading = False
        self._resume()
        if raw is END:
            return None
        self._read += 1
        return bytes(raw)

    def _resume(self) -> None:
        """After any event: does the call wait for its client now?"""
        if self.call.kind is CallKind.WATCH and self._read:
            self.call.waits(None, Cancelled("ended"))
        elif self._reading and (self._read <= self._written or not self.streaming):
            self._await_message()
        else:
            self.call.works()

    def _await_message(self) -> None:
        first = self._read == 0
        seconds = self.limits.message_s if first else self.limits.idle_s
        what = "a whole message" if first else "the next message"
        self.call.awaits_message(
            seconds,
            DeadlineExceeded(f"{what} did not come within {seconds:g} s", remedy="send it, or end the stream"),
        )
