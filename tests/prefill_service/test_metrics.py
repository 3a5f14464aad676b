"""What the prefill service counts is there from the start and grows by what happened."""

from __future__ import annotations

from chunk_store.entry import MissReason
from engine.kv.source import KVSource
from prefill_service.metrics import PrefillMetrics


def value(metrics: PrefillMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"cairn_{name}", {"model_name": "tiny", **labels})


def test_every_series_is_there_from_the_start() -> None:
    metrics = PrefillMetrics("tiny")
    for source in ("computed", "store", "device"):
        assert value(metrics, "prefill_tokens_total", source=source) == 0
    for outcome in ("computed", "already_stored", "resource_exhausted", "not_found", "internal"):
        assert value(metrics, "prefill_chunks_total", outcome=outcome) == 0
    for reason in MissReason:
        assert value(metrics, "prefill_misses_total", reason=reason.value) == 0
    assert value(metrics, "prefill_chunks_total", outcome="ok") is None
    assert value(metrics, "prefill_seconds_count") == 0


def test_what_happens_is_counted() -> None:
    metrics = PrefillMetrics("tiny")
    metrics.request_ended("computed", 0.25)
    metrics.tokens_made({KVSource.COMPUTED: 7, KVSource.STORE: 3})
    metrics.misses_met([MissReason.EVICTED, MissReason.EVICTED])
    assert value(metrics, "prefill_chunks_total", outcome="computed") == 1
    assert value(metrics, "prefill_seconds_sum") == 0.25
    assert value(metrics, "prefill_tokens_total", source="computed") == 7
    assert value(metrics, "prefill_misses_total", reason="evicted") == 2


def test_gauges_are_read_when_somebody_asks() -> None:
    metrics, pages = PrefillMetrics("tiny"), {"free": 5, "chunk": 1}
    metrics.watch(lambda: pages["chunk"] * 10, lambda: pages)
    assert value(metrics, "kv_pages", owner="free") == 5 and value(metrics, "prefill_queue_depth") == 10
    pages.update(free=4, chunk=2)
    assert value(metrics, "kv_pages", owner="free") == 4 and value(metrics, "prefill_queue_depth") == 20
