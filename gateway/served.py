"""Which model is served, as far as it is known here without asking each time."""

from __future__ import annotations

import time

from cairn import AsyncClient
from gateway.errors import HttpError

REMEMBERED_S = 30.0


class Served:
    """The name of the model that the decode services serve."""

    def __init__(self) -> None:
        self._name = ""
        self._asked_at = 0.0

    async def name(self, client: AsyncClient) -> str:
        """The name, asked with the caller's own token. Raises ``CairnError``."""
        loads = await client.loads()
        self._name, self._asked_at = loads.model_name, time.monotonic()
        return loads.model_name

    async def check(self, client: AsyncClient, wanted: str) -> None:
        """Raises ``HttpError`` 404 if another model is asked for, or ``CairnError``."""
        known = self._name if time.monotonic() - self._asked_at < REMEMBERED_S else ""
        if wanted != known and wanted != await self.name(client):
            message = "the model does not exist here; GET /v1/models names the one that does"
            raise HttpError(404, message, param="model", code="model_not_found")
