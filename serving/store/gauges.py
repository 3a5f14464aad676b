"""The store's own numbers, asked for when Prometheus asks.

Every process that shares a store tells the same numbers; the label ``store`` names it, so that a sum over processes can
take each store once: ``sum(max by (store) (cairn_store_bytes))``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from chunk_store.errors import StoreError
from chunk_store.shared_store import SharedStore
from chunk_store.store import StoreStats

ANSWER_S = 2.0  # a scrape waits so long; a store that is slower counts as down, and the service does not


class Numbers(NamedTuple):
    store: str
    stats: StoreStats


class StoreGauges(Collector):
    """``cairn_store_*``; only ``cairn_store_up`` 0 while the store does not answer in time."""

    def __init__(self, store: SharedStore, model_name: str) -> None:
        self._asker = _Asker(lambda: Numbers(store.identity(), store.stats()))
        self._model = model_name

    def describe(self) -> Iterator[Metric]:
        return iter(())  # registering asks nothing of the store

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("cairn_store_up", "Whether the chunk store answers.", labels=["model_name"])
        numbers = self._asker.ask()
        up.add_metric([self._model], 0 if numbers is None else 1)
        yield up
        if numbers is None:
            return
        for family, value in _families(numbers.stats):
            family.add_metric([self._model, numbers.store], value)
            yield family


def _families(stats: StoreStats) -> Iterator[tuple[GaugeMetricFamily | CounterMetricFamily, int]]:
    labels = ["model_name", "store"]
    gauges = (
        ("bytes", "Bytes that count toward the store's capacity.", stats.nbytes),
        ("capacity_bytes", "Capacity of the store.", stats.capacity_nbytes),
        ("quarantine_bytes", "Bad data kept for inspection; part of cairn_store_bytes.", stats.quarantine_nbytes),
        ("entries", "Stored KV entries.", stats.entries),
        ("pinned_entries", "Stored KV entries of pinned chunks.", stats.pinned_entries),
        ("leased_entries", "Stored KV entries that somebody is using.", stats.leased_entries),
        ("chunks", "Registered chunks.", stats.records),
        ("chunks_max", "Registered chunks at most.", stats.records_max),
    )
    for name, text, value in gauges:
        yield GaugeMetricFamily(f"cairn_store_{name}", text, labels=labels), value
    counters = (
        ("evictions", "Entries evicted since the store was made.", stats.evictions),
        ("quarantined", "Entries that failed verification since the store was made.", stats.quarantined),
    )
    for name, text, value in counters:
        yield CounterMetricFamily(f"cairn_store_{name}", text, labels=labels), value


class _Asker:
    """Asks in a thread of its own, one question at a time, so that a store that hangs does not hang the scrape."""

    def __init__(self, question: Callable[[], Numbers]) -> None:
        self._question = question
        self._lock = threading.Lock()
        self._asking: threading.Thread | None = None
        self._answer: Numbers | None = None

    def ask(self) -> Numbers | None:
        """The answer, or None if there is none within ``ANSWER_S`` seconds."""
        with self._lock:
            if self._asking is None or not self._asking.is_alive():
                self._answer = None
                self._asking = threading.Thread(target=self._ask, name="store-stats", daemon=True)
                self._asking.start()
            asking = self._asking
        asking.join(ANSWER_S)
        return None if asking.is_alive() else self._answer

    def _ask(self) -> None:
        try:
            self._answer = self._question()
        except StoreError:
            self._answer = None
