"""Prometheus metrics over HTTP on a port of their own. Which metrics there are is the services' business."""

from __future__ import annotations

import threading
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

STOP_S = 5.0

# Latency buckets that dashboards of this field know, finer below 10 ms.
SECONDS_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)


class MetricsEndpoint:
    """A running endpoint; ``start`` and ``stop`` come in pairs."""

    def __init__(self, server: Any, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread

    @classmethod
    def start(cls, registry: CollectorRegistry, host: str, port: int) -> MetricsEndpoint:
        """Serves ``registry`` at ``http://host:port/metrics``; port 0 is a free one. Raises ``OSError``."""
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            raise OSError(f"cannot serve metrics on {host}:{port}: {error}; is the port in use?") from error
        return cls(server, thread)

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def stop(self) -> None:
        """Closes the port; returns when the thread has ended."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(STOP_S)
