"""``GET /v1/cairn/loads``: how busy the decode service is, as far as the caller may know."""

from __future__ import annotations

from dataclasses import asdict

from starlette.responses import JSONResponse, Response

from gateway.api.asked import Asked


async def loads(asked: Asked) -> Response:
    """``cairn.Loads`` as JSON, without the replicas' addresses."""
    found = asdict(await asked.client.loads())
    del found["replicas"]
    return JSONResponse(found)
