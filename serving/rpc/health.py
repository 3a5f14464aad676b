"""grpc.health.v1: whether a service may be called. Watchers wait without holding anything that others need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.errors import NotFound

Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # generated, untyped
    """One status for each name it was made with, and all change together."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = frozenset(names)
        self._serving = False
        self._changed = asyncio.Event()

    def set(self, serving: bool) -> None:
        """Tells every watcher."""
        self._serving = serving
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names:
            raise NotFound(
                "unknown here", field="service", remedy="ask for the empty name or one that reflection lists"
            )
        return Status(status=self._status(request.service))

    async def List(self, request: health_pb2.HealthListRequest, context: Any) -> health_pb2.HealthListResponse:
        return health_pb2.HealthListResponse(
            statuses={name: Status(status=self._status(name)) for name in sorted(self._names)}
        )

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        told: int | None = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != told:
                told = status
                yield Status(status=status)
            await changed.wait()

    def _status(self, name: str) -> int:
        if name not in self._names:
            return int(Status.SERVICE_UNKNOWN)
        return int(Status.SERVING if self._serving else Status.NOT_SERVING)
