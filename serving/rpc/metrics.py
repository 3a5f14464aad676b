"""RPCs by method and status, also those refused at the door and those that their callers cancelled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from google.protobuf import descriptor_pool
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from serving.trace.buckets import SECONDS_BUCKETS

OTHER = "other"  # a method that there is not: its name is the caller's choice and no label


class RpcMetrics(Collector):
    """Told of calls by ``Arrival``; every method and status of the services is there from the start."""

    def __init__(self, service_names: Sequence[str]) -> None:
        """``service_names`` are full protobuf names, ``cairn.v1.DecodeService``."""
        self._registry = CollectorRegistry()
        self._labels = {path: path.rpartition("/")[2] for path in _paths(service_names)}
        registry, label = self._registry, ["method"]
        self._ended = Counter("cairn_rpcs", "RPCs that ended.", ["method", "code"], registry=registry)
        self._seconds = Histogram(
            "cairn_rpc_seconds", "RPCs from arrival to status.", label, registry=registry, buckets=SECONDS_BUCKETS
        )
        self._running = Gauge("cairn_rpcs_running", "RPCs that have not ended.", label, registry=registry)
        for method in (*self._labels.values(), OTHER):
            self._seconds.labels(method)
            self._running.labels(method)
            for code in StatusCode:
                self._ended.labels(method, code.name)

    def call_began(self, method: str) -> None:
        self._running.labels(self._label(method)).inc()

    def call_ended(self, method: str, code: StatusCode, seconds: float) -> None:
        label = self._label(method)
        self._running.labels(label).dec()
        self._ended.labels(label, code.name).inc()
        self._seconds.labels(label).observe(seconds)

    def collect(self) -> Iterable[Metric]:
        return self._registry.collect()

    def describe(self) -> Iterable[Metric]:
        return self._registry.collect()

    def _label(self, method: str) -> str:
        return self._labels.get(method, OTHER)


def _paths(service_names: Sequence[str]) -> Iterator[str]:
    pool = descriptor_pool.Default()
    for name in service_names:
        for method in pool.FindServiceByName(name).methods:
            yield f"/{name}/{method.name}"
