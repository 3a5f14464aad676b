"""The outermost interceptor: when a call arrived, which request it is, and how it ended.

It sees every call that reaches Python, also those that the gate refuses, so it is the one place that counts them. A
request id is the caller's (metadata ``x-request-id``) or a new one; it goes back in the trailing metadata and stands in
every log line of the call.
"""

from __future__ import annotations

import asyncio
import inspect
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
from grpc import StatusCode

from serving.rpc.channel import REQUEST_ID_KEY
from serving.rpc.handlers import behaviour_of, with_behaviour
from serving.trace.request_id import clean_request_id, set_request_id

_arrived_ns: ContextVar[int] = ContextVar("arrived_ns")


def arrived_ns() -> int:
    """Monotonic nanoseconds at which the call that this task serves reached us; now, outside of a call."""
    return _arrived_ns.get(0) or time.monotonic_ns()


def adopt_request_id(context: Any, request_id: str) -> None:
    """The caller named the request in its message: that name counts from here on. "" changes nothing."""
    if request_id:
        set_request_id(request_id)
        context.set_trailing_metadata(((REQUEST_ID_KEY, clean_request_id(request_id)),))


class CallObserver(Protocol):
    """Who is told of calls. ``method`` is the full name, ``/package.Service/Method``."""

    def call_began(self, method: str) -> None: ...

    def call_ended(self, method: str, code: StatusCode, seconds: float) -> None: ...


@dataclass
class _Call:
    method: str
    known: bool = True
    context: Any = None
    failed_with: StatusCode | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def code(self) -> StatusCode:
        """The status that the caller was given, as far as we know: one who left before is CANCELLED."""
        if not self.known:
            return StatusCode.UNIMPLEMENTED
        if self.context is None:
            return self.failed_with or StatusCode.CANCELLED  # its message never came
        told = self.context.code()
        if isinstance(told, StatusCode) and told is not StatusCode.OK:
            return told
        return self.failed_with or StatusCode.OK


class Arrival(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """First of a server's interceptors; ``observer`` is told of every call."""

    def __init__(self, observer: CallObserver) -> None:
        self._observer = observer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        # What is set here holds for the whole call: grpc runs interceptors and handler in one task.
        _arrived_ns.set(time.monotonic_ns())
        request_id = _wanted_id(handler_call_details.invocation_metadata) or uuid.uuid4().hex
        set_request_id(request_id)
        call = _Call(handler_call_details.method)
        self._observer.call_began(call.method)
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: self._ended(call))
        handler: Any | None = await continuation(handler_call_details)
        call.known = handler is not None
        return None if handler is None else _observed(handler, call, request_id)

    def _ended(self, call: _Call) -> None:
        self._observer.call_ended(call.method, call.code, time.monotonic() - call.began)


def _wanted_id(metadata: Any) -> str:
    values = [value for name, value in metadata or () if name == REQUEST_ID_KEY and isinstance(value, str)]
    return clean_request_id(values[-1]) if values else ""


def _observed(handler: Any, call: _Call, request_id: str) -> grpc.RpcMethodHandler[Any, Any]:
    behaviour = behaviour_of(handler)

    def begin(context: Any) -> None:
        call.context = context
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))

    async def one(request: Any, context: Any) -> Any:
        begin(context)
        try:
            return await behaviour(request, context)
        except BaseException as error:
            call.failed_with = _status(error, context)
            raise

    async def many(request: Any, context: Any) -> AsyncIterator[Any]:
        begin(context)
        try:
            async with aclosing(behaviour(request, context)) as replies:
                async for reply in replies:
                    yield reply
        except BaseException as error:
            call.failed_with = _status(error, context)
            raise

    # A streaming handler may also be a coroutine that writes to its context, as that of Health.Watch.
    return with_behaviour(handler, many if inspect.isasyncgenfunction(behaviour) else one)


def _status(error: BaseException, context: Any) -> StatusCode:
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return StatusCode.DEADLINE_EXCEEDED if context.time_remaining() == 0 else StatusCode.CANCELLED
    return StatusCode.UNKNOWN  # unless the handler has told another one
