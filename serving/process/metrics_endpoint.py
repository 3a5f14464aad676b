"""Prometheus metrics over HTTP on a port of their own. Which metrics there are is the services' business."""

from __future__ import annotations

import threading
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

STOP_S = 5.0
STEPS = (1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0, 6.3, 8.0)  # ten a decade


def buckets(lowest_exponent: int, highest_exponent: int) -> tuple[float, ...]:
    """Bounds from 10^lowest to 10^highest, ten a decade.

    Neighbours differ by a quarter, so a quantile that Prometheus interpolates is at most that far from the true one,
    usually half of it.
    """
    decades = range(lowest_exponent, highest_exponent)
    bounds = [round(step * 10.0**exponent, 9) for exponent in decades for step in STEPS]
    return (*bounds, 10.0**highest_exponent)


SECONDS_BUCKETS = buckets(-3, 2)
SHORT_SECONDS_BUCKETS = buckets(-4, 2)  # for what may take less than a millisecond
TOKENS_BUCKETS = tuple(float(1 << exponent) for exponent in range(21))


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
