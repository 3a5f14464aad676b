"""What the prefill service counts. Tokens and events, never ratios; labels never carry an id or a salt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from chunk_store.store import MissReason, StoreError, StoreStats
from prefill_service.computer import Source
from serving.metrics_endpoint import SECONDS_BUCKETS


class PrefillMetrics:
    """The metrics of one process in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        registry, model = self.registry, ["model_name"]
        self._chunks = Counter("cairn_prefill_chunks", "PrefillChunk requests.", [*model, "outcome"], registry=registry)
        self._tokens = Counter(
            "cairn_prefill_tokens", "Tokens of chunks and their context.", [*model, "source"], registry=registry
        )
        self._misses = Counter(
            "cairn_cache_misses", "Chunks whose KV the store did not serve.", [*model, "reason"], registry=registry
        )
        self._seconds = Histogram(
            "cairn_prefill_seconds", "PrefillChunk, all of it.", model, registry=registry, buckets=SECONDS_BUCKETS
        )
        self._depth = Gauge("cairn_prefill_queue_depth", "Requests that wait or run.", model, registry=registry)
        self._pages = Gauge("cairn_kv_pages", "Pages of the KV pool.", [*model, "owner"], registry=registry)
        for source in Source:
            self._tokens.labels(model_name, source.value)
        for reason in MissReason:
            self._misses.labels(model_name, reason.value)

    def request_ended(self, outcome: str, seconds: float) -> None:
        """One request is answered; ``outcome`` is a reply's outcome or an error's code, lower case."""
        self._chunks.labels(self._model, outcome).inc()
        self._seconds.labels(self._model).observe(seconds)

    def tokens_made(self, tokens: Mapping[Source, int]) -> None:
        for source, count in tokens.items():
            self._tokens.labels(self._model, source.value).inc(count)

    def misses_met(self, reasons: Iterable[MissReason]) -> None:
        for reason in reasons:
            self._misses.labels(self._model, reason.value).inc()

    def watch(self, jobs: Callable[[], int], pages: Callable[[], Mapping[str, int]]) -> None:
        """Reads queue depth and pages by owner when somebody asks for the metrics."""
        self._depth.labels(self._model).set_function(jobs)
        for owner in pages():
            self._pages.labels(self._model, owner).set_function(partial(_count_of, pages, owner))

    def watch_store(self, stats: Callable[[], StoreStats]) -> None:
        """The same for the store's own numbers, which all its processes share."""
        self.registry.register(_StoreCollector(stats, self._model))


def _count_of(pages: Callable[[], Mapping[str, int]], owner: str) -> float:
    return pages()[owner]


class _StoreCollector(Collector):
    """The store's counts at the time of the scrape; only ``cairn_store_up`` 0 while it cannot be asked."""

    def __init__(self, stats: Callable[[], StoreStats], model_name: str) -> None:
        self._stats = stats
        self._model = model_name

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("cairn_store_up", "Whether the chunk store answers.", labels=["model_name"])
        try:
            stats = self._stats()
        except StoreError:
            up.add_metric([self._model], 0)
            yield up
            return
        up.add_metric([self._model], 1)
        yield up
        gauges = (
            ("cairn_store_bytes", "Bytes that count toward the store's capacity.", stats.nbytes),
            ("cairn_store_capacity_bytes", "Capacity of the store.", stats.capacity_nbytes),
            ("cairn_store_entries", "Stored KV entries.", stats.entries),
            ("cairn_store_chunks", "Registered chunks.", stats.records),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        evictions = CounterMetricFamily("cairn_store_evictions", "Evictions since it was made.", labels=["model_name"])
        evictions.add_metric([self._model], stats.evictions)
        yield evictions
