"""Prometheus metrics over HTTP on a port of their own. Which metrics there are is the services' business."""

from __future__ import annotations

import threading
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

STOP_S = 5.0


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
