"""A call to another service, from a thread: its status becomes an error of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import grpc

from serving.errors import Cancelled
from serving.rpc.errors import error_from_status

POLL_S = 0.25

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
