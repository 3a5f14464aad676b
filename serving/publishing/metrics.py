"""What the publisher counts."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from chunk_store.errors import ClaimLost, QuotaFull, StoreFull, StoreUnavailable
from serving.errors import Overloaded, Unavailable
from serving.trace.buckets import SECONDS_BUCKETS

INTERNAL = "internal"
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (QuotaFull, "quota_full"),
    (StoreFull, "store_full"),
    (StoreUnavailable, "store_unavailable"),
    (ClaimLost, "claim_lost"),
    (Unavailable, "shutdown"),
    (Overloaded, "queue_full"),
)


class PublicationMetrics:
    """Entries on their way out of one process. Every reason is there from the start."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        model = ["model_name"]
        self._bytes = Counter(
            "cairn_publication_bytes", "Bytes of KV written behind and committed.", model, registry=registry
        ).labels(model_name)
        self._seconds = Histogram(
            "cairn_publication_seconds",
            "From the launch of an entry's last rows to its commit.",
            model,
            registry=registry,
            buckets=SECONDS_BUCKETS,
        ).labels(model_name)
        self._waits = Histogram(
            "cairn_publication_wait_seconds",
            "Waiting for room in a full queue.",
            model,
            registry=registry,
            buckets=SECONDS_BUCKETS,
        ).labels(model_name)
        self._failures = Counter(
            "cairn_publication_failures",
            "Entries that were computed and not stored, by why.",
            [*model, "reason"],
            registry=registry,
        )
        self._queue = Gauge(
            "cairn_publication_queue_bytes",
            "Bytes of KV computed or to be computed, not stored yet.",
            model,
            registry=registry,
        ).labels(model_name)
        self._model = model_name
        for reason in (*(reason for _, reason in _REASONS), INTERNAL):
            self._failures.labels(model_name, reason)

    def published(self, nbytes: int, seconds: float) -> None:
        self._bytes.inc(nbytes)
        self._seconds.observe(seconds)

    def failed(self, error: BaseException) -> None:
        reason = next((reason for kind, reason in _REASONS if isinstance(error, kind)), INTERNAL)
        self._failures.labels(self._model, reason).inc()

    def waited(self, seconds: float) -> None:
        self._waits.observe(seconds)

    def watch(self, queue_nbytes: Callable[[], int]) -> None:
        """Reads the queue's bytes when somebody asks for the metrics."""
        self._queue.set_function(queue_nbytes)
