"""``GET /health`` and ``GET /metrics``: for who runs the gateway, not for who uses it."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from cairn.client.errors import Unauthorized
from gateway.api.asked import Asked
from gateway.errors import HttpError


async def health(asked: Asked) -> Response:
    """200 while a decode service serves, else 503."""
    serving = await asked.gateway.upstream.serving()
    return JSONResponse({"status": "ok" if serving else "unavailable"}, 200 if serving else 503)


async def metrics(asked: Asked) -> Response:
    """The metrics in Prometheus' text format. They tell of all tenants: where there are tokens, for admins alone."""
    gateway = asked.gateway
    caller = gateway.callers.caller(asked.request.headers.get("authorization"))
    if not caller.admin:
        try:
            if gateway.callers.known is not None:
                raise Unauthorized("")
            await gateway.client.loads()  # bears no token: who is let in so, everybody is
        except Unauthorized:
            message = "metrics tell of all tenants: send an admin's token, or ask at the port of --metrics-port"
            raise HttpError(403, message, "permission_error", code="forbidden") from None
    return Response(generate_latest(gateway.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})
