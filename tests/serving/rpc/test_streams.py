"""One call's messages, over a context that says what comes: when the call waits for its client, and how long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from serving.errors import InvalidRequest, RequestError
from serving.rpc.open_calls import CallKind, CallLimits, Holder, OpenCall
from serving.rpc.streams import END, ClientStream, MessageKinds

LIMITS = CallLimits(message_s=11.0, idle_s=22.0, write_s=33.0)


class Watched(OpenCall):
    """A call that notes for whom it waits."""

    said: list[str]

    def waits(self, seconds: float | None, ending: RequestError) -> None:
        self.said.append(f"waits {seconds:g}" if seconds is not None else "waits")
        super().waits(seconds, ending)

    def works(self) -> None:
        self.said.append("works")
        super().works()


class Context:
    """What a client sends, and what was written to it."""

    def __init__(self, *messages: bytes) -> None:
        self.messages = [*messages, END]
        self.written: list[Any] = []

    async def read(self) -> Any:
        await asyncio.sleep(0)
        return self.messages.pop(0)

    async def send_initial_metadata(self, metadata: Any) -> None:
        self.written.append("metadata")

    async def write(self, reply: Any) -> None:
        self.written.append(reply)


def run(
    body: Callable[[ClientStream, Watched, Context], Awaitable[None]],
    *messages: bytes,
    streaming: bool = True,
    kind: CallKind = CallKind.WORK,
) -> None:
    async def main() -> None:
        async with asyncio.timeout(30) as deadline:
            call = Watched(kind, Holder("ipv4:1.2.3.4:5"), deadline)
            call.said = []
            context = Context(*messages)
            await body(ClientStream(call, context, LIMITS, bytes.decode, streaming), call, context)

    asyncio.run(main())


def test_one_message_is_waited_for_parsed_and_worked_on() -> None:
    async def body(stream: ClientStream, call: Watched, context: Context) -> None:
        assert await stream.only() == "hello"
        assert call.said == ["waits 11", "works"]

    run(body, b"hello", streaming=False)


def test_a_call_without_its_message_is_refused() -> None:
    async def body(stream: ClientStream, call: Watched, context: Context) -> None:
        with pytest.raises(InvalidRequest, match="message: missing"):
            await stream.only()

    run(body, streaming=False)


def test_a_stream_waits_for_its_client_when_all_that_came_is_answered() -> None:
    async def body(stream: ClientStream, call: Watched, context: Context) -> None:
        seen = []
        async for message in stream:
            seen.append(message)
            await stream.write(message.upper())
        assert seen == ["a", "b"] and context.written == ["metadata", "A", "B"]
        one = ["works", "waits 33", "works"]
        assert call.said == ["waits 11", *one, "waits 22", *one, "waits 22", "works"]

    run(body, b"a", b"b")


def test_a_stream_that_owes_answers_works_while_it_reads() -> None:
    async def body(stream: ClientStream, call: Watched, context: Context) -> None:
        assert [message async for message in stream] == ["a", "b"]
        assert call.said == ["waits 11", "works", "works", "works", "works", "works"]

    run(body, b"a", b"b")


def test_a_health_watch_may_wait_as_long_as_it_likes() -> None:
    async def body(stream: ClientStream, call: Watched, context: Context) -> None:
        await stream.only()
        await stream.write("status")
        assert call.said == ["waits 11", "works", "waits 33", "waits"]

    run(body, b"", streaming=False, kind=CallKind.WATCH)


def test_a_message_that_nobody_knows_is_read_as_its_handler_says() -> None:
    handler = SimpleNamespace(request_deserializer=bytes.upper)
    assert MessageKinds({}).of("/x.Y/z", handler, 10)(b"abc") == b"ABC"
