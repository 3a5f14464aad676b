"""Open connections: how many there may be, and how long one may take to ask something."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.metrics import GatewayMetrics

HEAD_S = 20.0  # for the head of the first request to arrive
IDLE_S = 75  # for the whole head of the next one, after an answer
HEAD_NBYTES_MAX = 32768
STATE = "connections"  # where a protocol finds them


class Connections:
    """All open ones. Where the bound is reached the one that asks nothing for the longest time goes for the new one."""

    def __init__(self, connections_max: int, metrics: GatewayMetrics) -> None:
        self._most = connections_max
        self._metrics = metrics
        self._open: set[BoundedProtocol] = set()

    def made(self, protocol: BoundedProtocol) -> None:
        self._open.add(protocol)
        self._metrics.connections.set(len(self._open))
        if len(self._open) > self._most:
            idle = [each for each in self._open if each.idle_since is not None and each is not protocol]
            oldest = min(idle, key=lambda each: each.idle_since or 0.0, default=protocol)
            self.close(oldest, "full")

    def lost(self, protocol: BoundedProtocol) -> None:
        self._open.discard(protocol)
        self._metrics.connections.set(len(self._open))

    def close(self, protocol: BoundedProtocol, reason: str) -> None:
        self._metrics.turned_away.labels(reason).inc()
        self.lost(protocol)
        protocol.transport.abort()


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a deadline for every head. ``idle_since`` is None while a request is answered."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.idle_since: float | None = self.loop.time()
        self._among: Connections = self.app_state[STATE]
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head(HEAD_S)
        self._among.made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._among.lost(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._wait_for_head(IDLE_S)
        super().on_response_complete()  # which may begin the next request
        if not self.cycle.response_complete:
            self._stop_waiting()

    def _wait_for_head(self, seconds: float) -> None:
        self._stop_waiting()
        self.idle_since = self.loop.time()
        self._timer = self.loop.call_later(seconds, self._among.close, self, "no_request")

    def _stop_waiting(self) -> None:
        self.idle_since = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
