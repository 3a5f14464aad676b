"""What the decode service counts: hit + computed = prompt, gaps between tokens, ends by their kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram

from chunk_store.entry import MissReason
from decode_service.metrics import DecodeMetrics
from decode_service.scheduling.sequence import Failed, Finished, FinishReason, Occupancy
from engine.kv.source import KVSource
from serving.errors import NotFound
from serving.trace.buckets import SHORT_SECONDS_BUCKETS
from tests.decode_service.prompts import answered


class Counted:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = DecodeMetrics(self.registry, model_name="tiny", token_nbytes=10)

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"cairn_{name}", {"model_name": "tiny", **labels})


@pytest.fixture
def counted() -> Counted:
    return Counted()


def test_every_series_is_there_from_the_start(counted: Counted) -> None:
    for source in KVSource:
        assert counted("prompt_tokens_by_source_total", source=source.value) == 0
    for reason in MissReason:
        assert counted("cache_misses_total", reason=reason.value) == 0
    for finished in FinishReason:
        assert counted("request_success_total", finished_reason=finished.value) == 0
    assert counted("request_failure_total", code="RESOURCE_EXHAUSTED") == 0
    assert counted("request_failure_total", code="OK") is None
    assert counted("generation_tokens_total") == counted("time_to_first_token_seconds_count") == 0


def test_a_prompt_is_accounted_for_by_source(counted: Counted) -> None:
    counted.metrics.prefilled(answered())
    by_source = {source: counted("prompt_tokens_by_source_total", source=source.value) for source in KVSource}
    assert by_source == {KVSource.DEVICE: 2, KVSource.STORE: 3, KVSource.HOST: 0, KVSource.COMPUTED: 5}
    assert counted("prompt_tokens_total") == 10 and counted("generation_tokens_total") == 1
    assert counted("cache_misses_total", reason="evicted") == 1
    assert counted("unpublished_chunks_total", reason="store_full") == 1
    assert counted("request_queue_time_seconds_sum") == pytest.approx(0.003)
    assert counted("request_prefill_time_seconds_sum") == pytest.approx(0.007)


def test_a_step_counts_bytes_and_gaps(counted: Counted) -> None:
    first, second = answered(), answered()
    for sequence in (first, second):
        counted.metrics.prefilled(sequence)
    plan: Any = SimpleNamespace(tokens_read=7)
    counted.metrics.stepped(plan, 12, [first, second])
    assert (counted("decode_bytes_read_total"), counted("decode_bytes_flat_total")) == (70, 120)
    assert counted("decode_steps_total") == 1 and counted("decode_batch_size_sum") == 2
    assert counted("inter_token_latency_seconds_count") == 2 and counted("generation_tokens_total") == 4


def test_gaps_of_a_step_are_counted_in_buckets_and_each_request_has_its_own(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As prometheus_client's own histogram would have them."""
    now = [0.0]
    monkeypatch.setattr("decode_service.metrics.time", SimpleNamespace(monotonic=lambda: now[0]))
    plan: Any = SimpleNamespace(tokens_read=7, tokens_flat=12)
    own = Histogram("own", "", ("model_name",), buckets=SHORT_SECONDS_BUCKETS, registry=counted.registry).labels("tiny")
    early = [answered() for _ in range(40)]
    for sequence in early:
        counted.metrics.prefilled(sequence)
    now[0], late = 0.05, answered()
    counted.metrics.prefilled(late)
    for at in (0.0625, 0.07, 0.1):
        for since in (*[0.0 if now[0] == 0.05 else now[0]] * 40, now[0]):
            own.observe(at - since)
        now[0] = at
        counted.metrics.stepped(plan, 12, [*early, late])
    samples = {
        name: {
            (s.name.removeprefix(name), s.labels.get("le")): s.value for s in family.samples if "created" not in s.name
        }
        for family in counted.registry.collect()
        if (name := family.name) in ("own", "cairn_inter_token_latency_seconds")
    }
    found = samples["cairn_inter_token_latency_seconds"]
    assert found == pytest.approx(samples["own"]) and found["_count", None] == 3 * 41


def test_ends_are_counted_by_kind(counted: Counted) -> None:
    counted.metrics.ended(answered(), Finished(FinishReason.LENGTH))
    counted.metrics.ended(answered(first_token=False), Finished(FinishReason.ABORT))
    counted.metrics.ended(answered(), Failed(NotFound("gone")))
    assert counted("request_success_total", finished_reason="length") == 1
    assert counted("request_failure_total", code="NOT_FOUND") == 1
    assert counted("e2e_request_latency_seconds_count") == 2
    assert counted("e2e_request_latency_seconds_sum") == pytest.approx(0.038)
    assert counted("request_generation_tokens_count") == counted("request_decode_time_seconds_count") == 1
    assert counted("request_decode_time_seconds_sum") == pytest.approx(0.008)


def test_a_request_that_ended_is_forgotten(counted: Counted) -> None:
    sequence = answered()
    counted.metrics.prefilled(sequence)
    counted.metrics.ended(sequence, Finished(FinishReason.STOP))
    assert not counted.metrics._last_token


def test_gauges_are_read_when_somebody_asks(counted: Counted) -> None:
    loads = [Occupancy(running=1, waiting=2, chunks_resident=3, pages={"free": 6, "chunk": 1, "tail": 1})]
    counted.metrics.watch_worker(lambda: loads[-1])
    assert counted("num_requests_waiting") == 2 and counted("kv_cache_usage_perc") == 0.25
    assert counted("kv_pages", owner="free") == 6
    loads.append(Occupancy(running=0, waiting=0, chunks_resident=0, pages={"free": 8, "chunk": 0, "tail": 0}))
    assert counted("num_requests_running") == 0 and counted("kv_pages", owner="free") == 8
