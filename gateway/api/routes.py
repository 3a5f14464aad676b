"""Which path is answered by what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.api import chunks
from gateway.api.asked import Asked, Endpoint
from gateway.api.chat import chat_completions
from gateway.api.completions import completions
from gateway.api.loads import loads
from gateway.api.models import model, models
from gateway.api.responses import responses
from gateway.api.state import health, metrics
from gateway.page.files import page_file


def _route(method: str, path: str, answer: Endpoint) -> Route:
    async def endpoint(request: Request) -> Response:
        request.state.route = path
        return await answer(Asked(request))

    named: Callable[[Request], Awaitable[Response]] = endpoint
    return Route(path, named, methods=[method])


def _file(name: str) -> Endpoint:
    async def answer(_: Asked) -> Response:
        return page_file(name)

    return answer


ROUTES = [
    _route("GET", "/", _file("index.html")),
    _route("GET", "/page.css", _file("page.css")),
    _route("GET", "/page.js", _file("page.js")),
    _route("GET", "/health", health),
    _route("GET", "/metrics", metrics),
    _route("GET", "/v1/models", models),
    _route("GET", "/v1/models/{model:path}", model),
    _route("GET", "/v1/cairn/loads", loads),
    _route("POST", "/v1/cairn/chunks", chunks.register),
    _route("GET", "/v1/cairn/chunks", chunks.listing),
    _route("GET", "/v1/cairn/chunks/{chunk}", chunks.retrieve),
    _route("DELETE", "/v1/cairn/chunks/{chunk}", chunks.delete),
    _route("PUT", "/v1/cairn/chunks/{chunk}/pin", chunks.pin),
    _route("DELETE", "/v1/cairn/chunks/{chunk}/pin", chunks.unpin),
    _route("POST", "/v1/completions", completions),
    _route("POST", "/v1/chat/completions", chat_completions),
    _route("POST", "/v1/responses", responses),
]
