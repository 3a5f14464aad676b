"""Every call passes here on its way to its handler: gate, access, bounds, deadlines, and the status of what it raises.

    starting -> open -> draining        calls are let in only while it is open

Health and reflection pass at any time (health also without a token, as probes have none). What a handler raises
becomes the status that ``serving.rpc.errors`` has for it, anything else INTERNAL with its traceback in the log.

To grpc every handler here takes a stream of bytes: the one message of a unary call is then read by us, under a deadline
and a bound, and bytes that are no message are the caller's fault and not an internal error.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, NoReturn

import grpc

from serving.errors import InternalFault, RequestError, Unavailable, request_error
from serving.rpc.access import Access
from serving.rpc.errors import error_metadata, status_of
from serving.rpc.handlers import behaviour_of
from serving.rpc.open_calls import CallKind, CallLimits, Holder, OpenCall, OpenCalls
from serving.rpc.parsing import MESSAGE_NBYTES_MAX
from serving.rpc.streams import ClientStream, MessageKinds
from serving.trace.printable import printable

HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection."
WATCH = HEALTH + "Watch"

log = logging.getLogger(__name__)


class CallGate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """The interceptor, and which calls are open now."""

    def __init__(self, access: Access, kinds: MessageKinds, limits: CallLimits | None = None) -> None:
        """``kinds`` are the request messages by method."""
        self._access = access
        self._kinds = kinds
        self._closed_because = "the service is starting; try again"
        self.calls = OpenCalls(limits or CallLimits())
        self.message_nbytes_max = MESSAGE_NBYTES_MAX

    def open(self) -> None:
        """Lets calls in."""
        self._closed_because = ""

    def close(self) -> None:
        """Refuses new calls with UNAVAILABLE and ends those that wait for a message; those that work go on."""
        self._closed_because = "the service is shutting down; try another one"
        self.calls.close(Unavailable(self._closed_because))

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no call of the service runs, at most ``timeout_s`` seconds; False if some still do."""
        try:
            await asyncio.wait_for(self.calls.no_work.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    @property
    def running(self) -> int:
        """Calls of the service itself."""
        return self.calls.count(CallKind.WORK)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler that answers; None where there is none, which grpc answers with UNIMPLEMENTED."""
        method = handler_call_details.method
        handler: Any | None = await continuation(handler_call_details)
        kind, token = _kind(method), ""
        if not method.startswith(HEALTH):
            try:
                token = self._access.check(handler_call_details.invocation_metadata)
                if self._closed_because and kind is CallKind.WORK:
                    raise Unavailable(self._closed_because)
            except RequestError as error:
                return _refusal(handler, error)
        return None if handler is None else self._guarded(handler, method, kind, token)

    @asynccontextmanager
    async def _open(self, kind: CallKind, token: str, context: Any) -> AsyncIterator[OpenCall]:
        """A call while its handler runs; what goes wrong in the block ends it with a status."""
        call: OpenCall | None = None
        try:
            async with asyncio.timeout(None) as deadline:
                call = OpenCall(kind, Holder(context.peer(), token), deadline)
                self.calls.enter(call)
                context.add_done_callback(lambda _: self.calls.leave(call))
                yield call
        except Exception as error:
            if call is None:
                raise
            self.calls.finishing(call)
            expired = isinstance(error, TimeoutError) and call.deadline.expired()
            await abort(context, call.ending if expired and call.ending is not None else error)
        self.calls.finishing(call)

    def _guarded(self, handler: Any, method: str, kind: CallKind, token: str) -> grpc.RpcMethodHandler[Any, Any]:
        behaviour = behaviour_of(handler)
        streaming = handler.request_streaming

        def client(call: OpenCall, context: Any) -> ClientStream:
            message = self._kinds.of(method, handler, self.message_nbytes_max)
            return ClientStream(call, context, self.calls.limits, message, streaming=streaming)

        async def one(_: Any, context: Any) -> Any:
            async with self._open(kind, token, context) as call:
                stream = client(call, context)
                return await behaviour(stream if streaming else await stream.only(), context)

        async def many(_: Any, context: Any) -> None:
            async with self._open(kind, token, context) as call:
                stream = client(call, context)
                requests = stream if streaming else await stream.only()
                # A call that ends early closes the handler's generator here and now, not when it is collected.
                async with aclosing(behaviour(requests, context)) as replies:
                    async for reply in replies:
                        await stream.write(reply)
                if streaming:
                    # Requests end alike when the caller has sent all and when it has left: the latter is told next.
                    await asyncio.sleep(0)

        return _taking_bytes(handler, many if handler.response_streaming else one)


def _kind(method: str) -> CallKind:
    if method.startswith(HEALTH):
        return CallKind.WATCH if method == WATCH else CallKind.CHECK
    return CallKind.REFLECTION if method.startswith(REFLECTION) else CallKind.WORK


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """Ends the call with the status that ``error`` stands for."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    told = request_error(error)
    code = status_of(told)
    if isinstance(told, InternalFault) and told is not error:
        log.error("a call failed", exc_info=error)
    else:
        log.info("refused: %s: %s", code.name, printable(told.message, 512))
    await context.abort(code, told.message, (*(context.trailing_metadata() or ()), *error_metadata(told)))
    raise AssertionError("abort raises")


def _refusal(handler: Any | None, error: RequestError) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same kind that only answers ``error``, without waiting for a message."""

    async def refuse(_: Any, context: Any) -> Any:
        await context.abort(status_of(error), error.message, error_metadata(error))

    return _taking_bytes(handler, refuse)


def _taking_bytes(handler: Any | None, behaviour: Callable[[Any, Any], Any]) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that reads a stream of bytes itself and answers as ``handler`` does."""
    many = handler is not None and handler.response_streaming
    make: Any = grpc.stream_stream_rpc_method_handler if many else grpc.stream_unary_rpc_method_handler
    made: grpc.RpcMethodHandler[Any, Any] = make(behaviour, None, handler.response_serializer if handler else None)
    return made
