"""One request on its way through a route: its body, its caller's client, and what the gateway has."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from cairn import AsyncClient
from gateway.api.fields import Fields
from gateway.body import read_json
from gateway.callers import Caller

if TYPE_CHECKING:
    from gateway.app import Gateway

ID_CHARACTERS = 100  # of a request's id in that of a call

Endpoint = Callable[["Asked"], Awaitable[Response]]


class Asked:
    """A request as the routes see it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.gateway: Gateway = request.app.state.gateway
        self.caller: Caller = getattr(request.state, "caller", Caller())
        self.request_id: str = request.state.request_id

    @property
    def client(self) -> AsyncClient:
        """The services, asked with the caller's token."""
        return self.gateway.client.with_token(self.caller.token)

    def new_id(self) -> str:
        """An id for a call of a service: the request's own begins it, and no other call has it."""
        return f"{self.request_id[:ID_CHARACTERS]}-{secrets.token_hex(4)}"

    async def fields(self) -> Fields:
        """The body's JSON object. Raises ``HttpError``."""
        return Fields(await read_json(self.request, self.request.state.held))

    def path(self, name: str) -> str:
        """A part of the path."""
        return str(self.request.path_params[name])

    def query(self) -> Fields:
        """The query's parameters, each a string."""
        return Fields(dict(self.request.query_params))
