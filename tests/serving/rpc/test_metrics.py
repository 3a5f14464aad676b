"""RPCs by method and status: every series is there from the start, and no caller makes new ones."""

from __future__ import annotations

import pytest
from grpc import StatusCode
from prometheus_client import CollectorRegistry

import protos.prefill_pb2  # noqa: F401  # registers the service
from serving.rpc.metrics import OTHER, RpcMetrics

SERVICE = "cairn.v1.PrefillService"
GET = f"/{SERVICE}/GetChunk"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> RpcMetrics:
    made = RpcMetrics([SERVICE])
    registry.register(made)
    return made


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"cairn_{name}", labels)


def test_a_call_runs_and_ends(registry: CollectorRegistry, metrics: RpcMetrics) -> None:
    assert value(registry, "rpcs_total", method="GetChunk", code="NOT_FOUND") == 0.0
    metrics.call_began(GET)
    assert value(registry, "rpcs_running", method="GetChunk") == 1.0
    metrics.call_ended(GET, StatusCode.NOT_FOUND, 0.25)
    assert value(registry, "rpcs_running", method="GetChunk") == 0.0
    assert value(registry, "rpcs_total", method="GetChunk", code="NOT_FOUND") == 1.0
    assert value(registry, "rpc_seconds_sum", method="GetChunk") == 0.25


def test_methods_that_there_are_not_are_one(registry: CollectorRegistry, metrics: RpcMetrics) -> None:
    before = {sample.name + str(sample.labels) for family in registry.collect() for sample in family.samples}
    for method in ("/x.Y/z", f"/{SERVICE}/Nothing", "", "GetChunk"):
        metrics.call_began(method)
        metrics.call_ended(method, StatusCode.UNIMPLEMENTED, 0.0)
    after = {sample.name + str(sample.labels) for family in registry.collect() for sample in family.samples}
    assert after == before
    assert value(registry, "rpcs_total", method=OTHER, code="UNIMPLEMENTED") == 4.0
