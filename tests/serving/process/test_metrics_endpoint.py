"""A process serves its own registry, and its histograms know durations to a quarter."""

from __future__ import annotations

import urllib.request
from itertools import pairwise

import pytest
from prometheus_client import CollectorRegistry, Counter

from serving.process.metrics_endpoint import SECONDS_BUCKETS, MetricsEndpoint


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


def test_neighbouring_buckets_differ_by_a_quarter() -> None:
    assert SECONDS_BUCKETS[0] == 0.001 and SECONDS_BUCKETS[-1] == 100.0
    assert all(1.2 < high / low < 1.3 for low, high in pairwise(SECONDS_BUCKETS))
