"""A store tells its own numbers, and does not hang who asks."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from chunk_store.errors import StoreUnavailable
from serving.store import gauges as store_gauges
from serving.store.gauges import StoreGauges
from tests.serving.store.metered_store import Metered, put


def told(registry: CollectorRegistry) -> dict[str, float]:
    return {sample.name: sample.value for family in registry.collect() for sample in family.samples}


def test_a_store_that_is_away_or_hangs_is_down_and_hangs_nobody(
    metered: Metered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_gauges, "ANSWER_S", 0.2)
    metered.registry.register(StoreGauges(metered.store, "tiny"))
    put(metered.store)
    found = told(metered.registry)
    assert found["cairn_store_up"] == 1 and found["cairn_store_entries"] == 1
    assert {"cairn_store_pinned_entries", "cairn_store_leased_entries", "cairn_store_quarantined_total"} <= found.keys()
    release, asked = threading.Event(), []

    def hang() -> Any:
        asked.append(1)
        release.wait(20)
        raise StoreUnavailable("gone")

    monkeypatch.setattr(metered.store, "stats", hang)
    for _ in range(3):
        found = told(metered.registry)
        assert found["cairn_store_up"] == 0 and "cairn_store_entries" not in found
    assert len(asked) == 1, "one question at a time"
    release.set()
    assert told(metered.registry)["cairn_store_up"] == 0
