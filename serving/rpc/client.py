"""Calls to another service, from a thread: a status becomes an error of ours."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from serving.errors import Cancelled
from serving.rpc.errors import error_from_status

POLL_S = 0.25
UNREAD_MAX = 64  # replies that are kept for whoever takes them; the service waits with more

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")


def call(
    method: grpc.UnaryUnaryMultiCallable[RequestT, ReplyT],
    request: RequestT,
    *,
    timeout_s: float,
    metadata: tuple[tuple[str, str], ...],
    abandoned: Callable[[], bool],
) -> ReplyT:
    """The reply of ``method``, a stub's.

    Raises the ``RequestError`` that the service's status stands for; ``Cancelled`` if nobody waits for it any more
    (``abandoned``, asked every ``POLL_S`` seconds), or the channel is closed; ``Unavailable`` if it is meanwhile.
    """
    try:
        running = method.future(request, timeout=timeout_s, metadata=metadata)
    except ValueError:
        raise Cancelled("the channel is closed") from None
    while True:
        try:
            return running.result(timeout=POLL_S)
        except grpc.FutureTimeoutError:
            if abandoned():
                running.cancel()  # type: ignore[no-untyped-call]  # of the two in the stubs it finds the bare one
                raise Cancelled("nobody waits for this any more") from None
        except grpc.RpcError as error:
            raise error_from_status(error) from error


def stream(
    method: grpc.UnaryStreamMultiCallable[RequestT, ReplyT],
    request: RequestT,
    *,
    timeout_s: float,
    metadata: tuple[tuple[str, str], ...],
    abandoned: Callable[[], bool],
) -> Iterator[ReplyT]:
    """The replies of ``method``, a stub's, as they come. Left early, the call is cancelled.

    Raises the ``RequestError`` that the service's status stands for; ``Cancelled`` if nobody waits for it any more
    (``abandoned``, asked every ``POLL_S`` seconds), or the channel is closed; ``Unavailable`` if it is meanwhile.
    """
    try:
        running: Any = method(request, timeout=timeout_s, metadata=metadata)
    except ValueError:
        raise Cancelled("the channel is closed") from None
    replies: queue.Queue[ReplyT | grpc.RpcError | None] = queue.Queue(UNREAD_MAX)
    left = threading.Event()

    def put(reply: ReplyT | grpc.RpcError | None) -> None:
        while not left.is_set():
            try:
                return replies.put(reply, timeout=POLL_S)
            except queue.Full:
                continue

    def read() -> None:  # its own thread, for a call cannot be read for a while only
        try:
            for reply in running:
                put(reply)
            put(None)
        except grpc.RpcError as error:
            put(error)

    threading.Thread(target=read, name="cairn-replies", daemon=True).start()
    try:
        while True:
            try:
                reply = replies.get(timeout=POLL_S)
            except queue.Empty:
                if abandoned():
                    raise Cancelled("nobody waits for this any more") from None
                continue
            if reply is None:
                return
            if isinstance(reply, grpc.RpcError):
                raise error_from_status(reply) from reply
            yield reply
    finally:
        left.set()
        running.cancel()
