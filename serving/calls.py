"""Every call passes here on its way to its handler: gate, access, status of what it raises.

    starting -> open -> draining        calls are let in only while it is open

Health and reflection pass at any time (health also without a token, as probes have none). What a handler raises
becomes the status that ``serving.errors`` has for it, anything else INTERNAL with its traceback in the log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, cast

import grpc
from grpc import StatusCode

from serving.access import Access
from serving.errors import RequestError, internal_error, request_error
from serving.handlers import behaviour_of, with_behaviour
from serving.logs import printable

HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection."

log = logging.getLogger(__name__)


class CallGate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """The interceptor, and how many calls of the service itself run now."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._closed_because = "the service is starting; try again"
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self) -> None:
        """Lets calls in."""
        self._closed_because = ""

    def close(self) -> None:
        """Refuses new calls with UNAVAILABLE; those that run go on."""
        self._closed_because = "the service is shutting down; try another one"

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no call runs, at most ``timeout_s`` seconds; False if some still do."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    @property
    def running(self) -> int:
        return self._running

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler that answers; None where there is none, which grpc answers with UNIMPLEMENTED."""
        method = handler_call_details.method
        handler: Any | None = await continuation(handler_call_details)
        if method.startswith(HEALTH):
            return handler
        try:
            self._access.check(handler_call_details.invocation_metadata)
            if self._closed_because and not method.startswith(REFLECTION):
                raise RequestError(StatusCode.UNAVAILABLE, self._closed_because)
        except RequestError as error:
            return _refusal(handler, error)
        if handler is None or method.startswith(REFLECTION):
            return handler
        return self._guarded(handler)

    def _enter(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._running += 1
        self._idle.clear()
        context.add_done_callback(cast(Any, self._leave))  # the stubs want a subclass where any callable does

    def _leave(self, _: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._running -= 1
        if self._running == 0:
            self._idle.set()

    def _guarded(self, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        behaviour = behaviour_of(handler)

        async def one(request: Any, context: Any) -> Any:
            self._enter(context)
            try:
                return await behaviour(request, context)
            except Exception as error:
                await abort(context, error)

        async def many(request: Any, context: Any) -> AsyncIterator[Any]:
            self._enter(context)
            try:
                # A call that ends early closes the handler's generator here and now, not when it is collected.
                async with aclosing(behaviour(request, context)) as replies:
                    async for reply in replies:
                        yield reply
            except Exception as error:
                await abort(context, error)

        return with_behaviour(handler, many if handler.response_streaming else one)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """Ends the call with the status that ``error`` stands for."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    known = request_error(error)
    if known is None:
        log.error("a call failed", exc_info=error)
        known = internal_error(error)
    else:
        log.info("refused: %s: %s", known.code.name, printable(known.message, 512))
    await context.abort(known.code, known.message, (*(context.trailing_metadata() or ()), *known.metadata))
    raise AssertionError("abort raises")


def _refusal(handler: Any | None, error: RequestError) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same kind that only answers ``error``."""

    async def one(_: Any, context: Any) -> Any:
        await context.abort(error.code, error.message)

    async def many(_: Any, context: Any) -> AsyncIterator[Any]:
        await context.abort(error.code, error.message)
        yield  # what makes this a generator

    if handler is None:
        return grpc.unary_unary_rpc_method_handler(one)
    return with_behaviour(handler, many if handler.response_streaming else one)
