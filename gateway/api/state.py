"""``GET /health`` and ``GET /metrics``: for who runs the gateway, not for who uses it."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from gateway.api.asked import Asked


async def health(asked: Asked) -> Response:
    """200 while the gateway answers."""
    return JSONResponse({"status": "ok"})


async def metrics(asked: Asked) -> Response:
    """The metrics in Prometheus' text format."""
    return Response(generate_latest(asked.gateway.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})
