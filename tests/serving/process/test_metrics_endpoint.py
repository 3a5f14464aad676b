"""A process serves its own registry."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from serving.process.metrics_endpoint import MetricsEndpoint


def test_metrics_are_served_from_their_own_registry_and_stop() -> None:
    registry = CollectorRegistry()
    Counter("cairn_stones", "Stones.", registry=registry).inc(3)
    endpoint = MetricsEndpoint.start(registry, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{endpoint.port}/metrics"
    with urllib.request.urlopen(url, timeout=5) as reply:
        text = reply.read().decode()
    assert "cairn_stones_total 3.0" in text and "python_info" not in text
    with pytest.raises(OSError, match="in use"):
        MetricsEndpoint.start(registry, "127.0.0.1", endpoint.port)
    endpoint.stop()
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=5)
