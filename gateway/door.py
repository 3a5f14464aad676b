"""The outermost part of the application: who comes in, under which id, and how every request ends."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cairn.client.errors import CairnError
from gateway.body import Room
from gateway.callers import Callers
from gateway.errors import HttpError, http_error
from gateway.metrics import GatewayMetrics
from serving.trace.request_id import clean_request_id, set_request_id

log = logging.getLogger(__name__)

GUARDED = "/v1/"  # where a caller is asked for and counted
CLIENT_GONE = 499  # as proxies count it; nobody receives it
OTHER = "other"


@dataclass
class _Passage:
    """One request on its way: what has been read of it, and what was answered."""

    request_id: str
    began: float = field(default_factory=time.monotonic)
    read: bool = False  # the whole body
    status: int = 0


class Door:
    """ASGI application around another one."""

    def __init__(
        self,
        app: ASGIApp,
        callers: Callers,
        room: Room,
        metrics: GatewayMetrics,
        *,
        hosts: frozenset[str] | None,
        request_timeout_s: float,
    ) -> None:
        """``hosts``: the names that requests may come to; None for any."""
        self._app = app
        self._callers = callers
        self._room = room
        self._metrics = metrics
        self._hosts = hosts
        self._timeout_s = request_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        scope["state"] = dict(scope.get("state", {}))
        given = clean_request_id(headers.get(b"x-request-id", b"").decode("latin-1"))
        passage = _Passage(given or uuid.uuid4().hex)
        set_request_id(passage.request_id)
        self._metrics.running.inc()

        async def reading() -> Message:
            message = await receive()
            passage.read = passage.read or not message.get("more_body", False)
            return message

        async def answering(message: Message) -> None:
            if message["type"] == "http.response.start":
                passage.status = message["status"]
                added = [(b"x-request-id", passage.request_id.encode()), (b"x-content-type-options", b"nosniff")]
                if not passage.read and _has_body(headers):  # nobody reads the rest of it
                    added.append((b"connection", b"close"))
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        try:
            await self._answer(scope, reading, answering, passage, headers)
        finally:
            self._metrics.running.dec()
            self._note(scope, passage)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, passage: _Passage, headers: dict[bytes, bytes]
    ) -> None:
        caller = None
        try:
            async with asyncio.timeout(self._timeout_s):
                state = scope["state"]
                state["request_id"] = passage.request_id
                self._check_host(headers.get(b"host", b"").decode("latin-1"))
                authorization = headers.get(b"authorization")
                if scope["path"].startswith(GUARDED):
                    words = None if authorization is None else authorization.decode("latin-1")
                    state["caller"] = self._callers.caller(words)
                    self._callers.enter(state["caller"])
                    caller = state["caller"]
                with self._room.held() as held:
                    state["held"] = held
                    await self._app(scope, receive, send)
        except ClientDisconnect:
            passage.status = passage.status or CLIENT_GONE
            self._metrics.cancelled.inc()
        except (HttpError, CairnError, Exception) as error:
            await _fail(scope, receive, send, passage, error)
        finally:
            if caller is not None:
                self._callers.leave(caller)

    def _check_host(self, host: str) -> None:
        """Without tokens this machine alone may ask: not a page of elsewhere whose name was turned to this address."""
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._hosts is not None and name.strip("[]").lower() not in self._hosts:
            raise HttpError(421, "the host is none of this gateway's; give --http-names", code="misdirected_request")

    def _note(self, scope: Scope, passage: _Passage) -> None:
        route = scope["state"].get("route", OTHER)
        seconds = time.monotonic() - passage.began
        self._metrics.requests.labels(route, str(passage.status or 500)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        log.info("%s %s %d in %.3f s", scope["method"], route, passage.status, seconds)


async def _fail(scope: Scope, receive: Receive, send: Send, passage: _Passage, error: Exception) -> None:
    """The answer to a request that failed; of one whose answer has begun the connection ends."""
    told = _told(error)
    if told.status >= 500:
        log.warning("%s", error, exc_info=None if isinstance(error, HttpError | CairnError | TimeoutError) else error)
    if passage.status:
        log.warning("failed after its answer had begun: %s", type(error).__name__)
        raise error
    await told.response()(scope, receive, send)


def _told(error: Exception) -> HttpError:
    if isinstance(error, HttpError):
        return error
    if isinstance(error, CairnError):
        return http_error(error)
    if isinstance(error, TimeoutError):
        return HttpError(504, "the answer took longer than it may", "timeout_error", code="deadline_exceeded")
    return HttpError(500, "the gateway failed; its log says why", "server_error", code="internal_error")


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
