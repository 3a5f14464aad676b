"""Entries in Redis: found in steps, adopted, forgotten."""

from __future__ import annotations

import pytest

from chunk_store.entry import MissReason
from chunk_store.ledger import Ledger
from chunk_store.redis import entries
from chunk_store.tenant import DEFAULT_TENANT
from tests.chunk_store.contract import MODEL, sample
from tests.chunk_store.local.conftest import store, stored


def test_entries_are_listed_over_as_many_steps_as_it_takes(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "STEP_ENTRIES", 2)
    store(ledger, sample(1), sample(2), sample(3, salt="a"))
    assert set(stored(ledger)) == {placed.key for placed in ledger.entries.placed()}
    assert len(stored(ledger)) == 3 and ledger.entries.listed([sample(3).chunk_id]) == []
    found = ledger.entries.find([sample(2).key, sample(9).key, sample(1).key])
    assert [info and info.key for info in found] == [sample(2).key, None, sample(1).key]
    assert ledger.entries.find([]) == [] and ledger.entries.locate(sample(9).key) is None


def test_a_miss_has_its_reason(ledger: Ledger) -> None:
    under, other = sample(1, context=[sample(2).key]), sample(1).header
    store(ledger, under)
    assert ledger.entries.miss_reason(other.key, other.chunk_id, MODEL, DEFAULT_TENANT) is MissReason.CONTEXT_DIFFERS
    ledger.claims.evict(1)
    assert ledger.entries.miss_reason(under.key, under.chunk_id, MODEL, DEFAULT_TENANT) is MissReason.EVICTED
    assert ledger.entries.miss_reason(other.key, other.chunk_id, MODEL, DEFAULT_TENANT) is MissReason.NOT_STORED


def test_adopting_and_forgetting_go_by_the_blob(ledger: Ledger) -> None:
    assert ledger.entries.adopt(sample(1).header, "blob", 5)
    assert not ledger.entries.adopt(sample(1).header, "another", 5)
    assert not ledger.entries.forget(sample(1).key, "another", quarantined=True)
    assert ledger.entries.forget(sample(1).key, "blob", quarantined=True)
    assert ledger.upkeep.stats("x").quarantined == 1 and ledger.upkeep.garbage() == ["blob"]
