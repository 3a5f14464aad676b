"""What the prefill service counts. Tokens and events, never ratios; labels never carry an id or a salt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from chunk_store.entry import MissReason
from engine.kv.source import KVSource
from serving.rpc.errors import STATUS_NAMES
from serving.trace.buckets import SECONDS_BUCKETS

ANSWERS = ("computed", "already_stored")
SOURCES = (KVSource.COMPUTED, KVSource.STORE, KVSource.DEVICE)


class PrefillMetrics:
    """The metrics of one process in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        registry, model = self.registry, ["model_name"]
        self._chunks = Counter(
            "cairn_prefill_chunks", "Chunks asked for, and refused calls.", [*model, "outcome"], registry=registry
        )
        self._tokens = Counter(
            "cairn_prefill_tokens", "Tokens of chunks and their context.", [*model, "source"], registry=registry
        )
        self._misses = Counter(
            "cairn_prefill_misses",
            "Chunks that a call needed and did not find stored.",
            [*model, "reason"],
            registry=registry,
        )
        self._seconds = Histogram(
            "cairn_prefill_seconds",
            "From a call to its answer for a chunk.",
            model,
            registry=registry,
            buckets=SECONDS_BUCKETS,
        )
        self._depth = Gauge("cairn_prefill_queue_depth", "Requests that wait or run.", model, registry=registry)
        self._pages = Gauge("cairn_kv_pages", "Pages of the KV pool.", [*model, "owner"], registry=registry)
        for source in SOURCES:
            self._tokens.labels(model_name, source.value)
        for reason in MissReason:
            self._misses.labels(model_name, reason.value)
        for outcome in (*ANSWERS, *(name.lower() for name in STATUS_NAMES)):
            self._chunks.labels(model_name, outcome)
        self._seconds.labels(model_name)

    def request_ended(self, outcome: str, seconds: float) -> None:
        """A chunk is answered for, or a call refused; ``outcome``: the reply's, or the error's code, lower case."""
        self._chunks.labels(self._model, outcome).inc()
        self._seconds.labels(self._model).observe(seconds)

    def tokens_made(self, tokens: Mapping[KVSource, int]) -> None:
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


def _count_of(pages: Callable[[], Mapping[str, int]], owner: str) -> float:
    return pages()[owner]
