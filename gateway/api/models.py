"""``GET /v1/models`` and ``GET /v1/models/NAME``."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from gateway.api.asked import Asked
from gateway.errors import HttpError


async def models(asked: Asked) -> Response:
    """The one model that is served."""
    name = await asked.gateway.served.name(asked.client)
    return JSONResponse({"object": "list", "data": [_model(name)]})


async def model(asked: Asked) -> Response:
    """The same by its name."""
    name = await asked.gateway.served.name(asked.client)
    if asked.path("model") != name:
        raise HttpError(404, "the model does not exist here", param="model", code="model_not_found")
    return JSONResponse(_model(name))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "cairn"}
