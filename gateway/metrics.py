"""The gateway's metrics. Labels bear no models, tenants, tokens or paths of a caller's choice."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from serving.process.version import package_version

LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class GatewayMetrics:
    """What is counted. A request is one that was routed; ``other`` stands for all that was not."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = Gauge("cairn_gateway_build_info", "What serves; always 1.", ["version"], registry=self.registry)
        build.labels(package_version()).set(1)
        self.requests = Counter(
            "cairn_gateway_requests", "HTTP requests by route and status", ["route", "status"], registry=self.registry
        )
        self.running = Gauge("cairn_gateway_requests_running", "HTTP requests in work", registry=self.registry)
        self.seconds = Histogram(
            "cairn_gateway_request_seconds",
            "From a request's head to the end of its answer",
            ["route"],
            buckets=LATENCIES,
            registry=self.registry,
        )
        self.cancelled = Counter(
            "cairn_gateway_requests_cancelled", "Requests whose caller went before the answer", registry=self.registry
        )
        self.connections = Gauge("cairn_gateway_connections", "Open connections", registry=self.registry)
        self.turned_away = Counter(
            "cairn_gateway_connections_closed",
            "Connections that were closed on",
            ["reason"],
            registry=self.registry,
        )
        for reason in ("full", "no_request"):
            self.turned_away.labels(reason)
