"""The application: what requests have in common, and the routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from cairn import AsyncClient
from cairn.client.errors import CairnError
from cairn.client.replicas import addresses_of
from gateway.api.routes import ROUTES
from gateway.body import Room
from gateway.callers import Callers
from gateway.connections import STATE, Connections
from gateway.door import Door
from gateway.errors import HttpError, http_error
from gateway.metrics import GatewayMetrics
from gateway.options import GatewayOptions
from gateway.served import Served
from gateway.upstream import Upstream


@dataclass(frozen=True)
class Gateway:
    """All that lives as long as the process."""

    client: AsyncClient
    served: Served
    callers: Callers
    room: Room
    metrics: GatewayMetrics
    connections: Connections
    upstream: Upstream
    hosts: frozenset[str] | None
    request_timeout_s: float

    @classmethod
    def of(cls, options: GatewayOptions) -> Gateway:
        """What was told, put together; connects to nobody yet. Raises ``OSError`` or ``ValueError``."""
        metrics = GatewayMetrics()
        tls = None if options.tls_ca is None else str(options.tls_ca)
        client = AsyncClient(
            options.prefill, options.decode, tls=tls, timeout_s=options.request_timeout_s, wait_overloaded=False
        )
        return cls(
            client=client,
            served=Served(),
            callers=Callers(options.token_file, options.requests_max),
            room=Room(options.bodies_max, options.body_max),
            metrics=metrics,
            connections=Connections(options.connections_max, metrics),
            upstream=Upstream(addresses_of(options.decode), tls),
            hosts=options.hosts,
            request_timeout_s=options.request_timeout_s,
        )


def make_app(gateway: Gateway) -> ASGIApp:
    """The ASGI application."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
        yield {STATE: gateway.connections}
        await gateway.client.aclose()
        await gateway.upstream.close()

    handlers: Any = {HTTPException: _not_routed, HttpError: _refused, CairnError: _failed}
    app = Starlette(routes=ROUTES, exception_handlers=handlers, lifespan=lifespan)
    app.state.gateway = gateway
    return Door(
        app,
        gateway.callers,
        gateway.room,
        gateway.metrics,
        hosts=gateway.hosts,
        request_timeout_s=gateway.request_timeout_s,
    )


async def _not_routed(_: Request, error: HTTPException) -> Response:
    words = {404: "there is no such path here", 405: "this path has other methods"}
    code = "not_found" if error.status_code == 404 else "method_not_allowed"
    headers = error.headers or {}
    return HttpError(
        error.status_code, words.get(error.status_code, error.detail), code=code, headers=headers
    ).response()


async def _refused(_: Request, error: HttpError) -> Response:
    return error.response()


async def _failed(_: Request, error: CairnError) -> Response:
    return http_error(error).response()
