"""Calls to another service: a reply or several, or an error of ours."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from serving.errors import Cancelled, DeadlineExceeded, Overloaded, RequestError, Unavailable
from serving.rpc.channel import Target
from serving.rpc.client import UNREAD_MAX, call, stream
from serving.rpc.errors import error_metadata, status_of

MANY = "/a.B/Many"


class Peer(grpc.GenericRpcHandler):
    """Answers with what it was given, raises what it is told to, or waits."""

    def __init__(self) -> None:
        self.error: RequestError | None = None
        self.free = threading.Event()
        self.free.set()
        self.metadata: dict[str, Any] = {}
        self.ended = threading.Event()

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method == MANY:
            return grpc.unary_stream_rpc_method_handler(self._answers)
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answers(self, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """As many replies as the message has bytes, then what one reply would be followed by."""
        context.add_callback(self.ended.set)
        for number in message:
            yield bytes([number])
        self._answer(message, context)

    def _answer(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        self.metadata = {key: value for key, value in context.invocation_metadata()}
        self.free.wait(30)
        if self.error is not None:
            context.set_trailing_metadata(error_metadata(self.error))
            context.abort(status_of(self.error), self.error.message)
        return message


@pytest.fixture
def peer() -> Iterator[Peer]:
    yield (made := Peer())
    made.free.set()


@pytest.fixture
def channel(peer: Peer) -> Iterator[grpc.Channel]:
    server = grpc.server(ThreadPoolExecutor(4))  # two calls that nobody waits for hold a thread each
    server.add_generic_rpc_handlers((peer,))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    with Target(address).open() as opened:
        yield opened
    peer.free.set()
    server.stop(None)


def ask(channel: grpc.Channel, *, timeout_s: float = 30.0, abandoned: bool = False) -> bytes:
    method: Any = channel.unary_unary("/a.B/C", None, None)
    metadata = (("x-request-id", "mine"),)
    reply: bytes = call(method, b"hello", timeout_s=timeout_s, metadata=metadata, abandoned=lambda: abandoned)
    return reply


def ask_many(
    channel: grpc.Channel, message: bytes = b"ab", *, timeout_s: float = 30.0, abandoned: bool = False
) -> Iterator[bytes]:
    method: Any = channel.unary_stream(MANY, None, None)
    yield from stream(method, message, timeout_s=timeout_s, metadata=(), abandoned=lambda: abandoned)


def test_the_reply_and_what_was_sent_with_it(peer: Peer, channel: grpc.Channel) -> None:
    assert ask(channel) == b"hello" and peer.metadata["x-request-id"] == "mine"


def test_a_status_is_an_error_of_ours(peer: Peer, channel: grpc.Channel) -> None:
    peer.error = Overloaded("full", field="jobs", retry_after_s=0.5, reason="WHY")
    with pytest.raises(Overloaded, match="jobs: full") as caught:
        ask(channel)
    assert (caught.value.retry_after_s, caught.value.reason) == (0.5, "WHY")


def test_it_ends_at_its_deadline_and_when_nobody_waits(peer: Peer, channel: grpc.Channel) -> None:
    peer.free.clear()
    with pytest.raises(DeadlineExceeded):
        ask(channel, timeout_s=0.2)
    with pytest.raises(Cancelled, match="nobody waits"):
        ask(channel, abandoned=True)


def test_replies_come_one_by_one_and_the_status_after_them(peer: Peer, channel: grpc.Channel) -> None:
    many = bytes(range(UNREAD_MAX + 9))
    assert b"".join(ask_many(channel, many)) == many
    peer.free.clear()
    replies = ask_many(channel)
    assert [next(replies), next(replies)] == [b"a", b"b"]
    peer.error = Overloaded("full", reason="WHY")
    peer.free.set()
    with pytest.raises(Overloaded, match="full") as caught:
        next(replies)
    assert caught.value.reason == "WHY"


def test_a_stream_ends_at_its_deadline_when_nobody_waits_and_when_it_is_left(peer: Peer, channel: grpc.Channel) -> None:
    peer.free.clear()
    with pytest.raises(DeadlineExceeded):
        list(ask_many(channel, timeout_s=0.2))
    with pytest.raises(Cancelled, match="nobody waits"):
        list(ask_many(channel, abandoned=True))
    peer.ended.clear()
    replies: Any = ask_many(channel, bytes(9 * UNREAD_MAX))
    assert next(replies) == b"\0"
    replies.close()
    assert peer.ended.wait(30), "it is cancelled, with replies unread"


def test_a_channel_that_is_closed_meanwhile(peer: Peer, channel: grpc.Channel) -> None:
    peer.free.clear()
    closing = threading.Timer(0.3, channel.close)
    closing.start()
    with pytest.raises(Unavailable, match="closed"):
        ask(channel)
    closing.join()
    with pytest.raises(Cancelled, match="closed"):
        list(ask_many(channel))
    with pytest.raises(Cancelled, match="closed"):
        ask(channel)


def test_nobody_there() -> None:
    with Target("127.0.0.1:9").open() as nowhere, pytest.raises(Unavailable) as caught:
        ask(nowhere)
    assert caught.value.retry and status_of(caught.value) is StatusCode.UNAVAILABLE
