"""Entries in an index: found, missed for a reason, adopted, forgotten."""

from __future__ import annotations

from chunk_store.entry import MissReason
from chunk_store.key import ModelIdentity
from chunk_store.ledger import Ledger, Placed
from chunk_store.tenant import DEFAULT_TENANT, tenant_of
from tests.chunk_store.contract import MODEL, sample
from tests.chunk_store.local.conftest import STORED_NBYTES, store, stored

OTHER = ModelIdentity("model-2")


def test_what_was_committed_is_found_in_the_order_it_was_asked_for(ledger: Ledger) -> None:
    store(ledger, sample(1), sample(2))
    found = ledger.entries.find([sample(2).key, sample(3).key, sample(1).key])
    assert [info and info.key for info in found] == [sample(2).key, None, sample(1).key]
    assert found[0] is not None and (found[0].tokens, found[0].nbytes) == (5, 1120)
    assert ledger.entries.locate(sample(1).key) == Placed(sample(1).key, f"{sample(1).key}.one", STORED_NBYTES)
    assert len(ledger.entries.placed()) == 2 and ledger.entries.locate(sample(3).key) is None


def test_entries_are_listed_by_chunk_and_tenant(ledger: Ledger) -> None:
    salted = sample(1, salt="a")
    store(ledger, sample(1), salted)
    assert [info.key for info in ledger.entries.listed([sample(1).chunk_id])] == [sample(1).key]
    assert [info.key for info in ledger.entries.listed([salted.chunk_id], [tenant_of("a")])] == [salted.key]
    assert stored(ledger) == [sample(1).key, salted.key] and ledger.entries.listed([sample(2).chunk_id]) == []


def test_a_miss_has_its_reason(ledger: Ledger) -> None:
    under = sample(1, context=[sample(2).key])
    store(ledger, under)

    def reason(entry: int, model: ModelIdentity = MODEL, salt: str = "") -> MissReason:
        header = sample(entry).header
        return ledger.entries.miss_reason(header.key, header.chunk_id, model, tenant_of(salt))

    assert reason(1) is MissReason.CONTEXT_DIFFERS and reason(3) is MissReason.NOT_STORED
    assert reason(1, OTHER) is MissReason.NOT_STORED and reason(1, salt="a") is MissReason.NOT_STORED
    ledger.claims.evict(STORED_NBYTES)
    header = under.header
    assert ledger.entries.miss_reason(header.key, header.chunk_id, MODEL, DEFAULT_TENANT) is MissReason.EVICTED


def test_a_stray_is_adopted_where_nobody_has_or_writes_its_key(ledger: Ledger) -> None:
    assert ledger.entries.adopt(sample(1).header, "blob", 5)
    assert not ledger.entries.adopt(sample(1).header, "another", 5)
    ledger.claims.claim(sample(2).key, "n", 30.0)
    assert not ledger.entries.adopt(sample(2).header, "blob 2", 5)
    assert stored(ledger) == [sample(1).key]


def test_only_the_blob_that_an_entry_still_has_is_forgotten(ledger: Ledger) -> None:
    store(ledger, sample(1))
    blob = f"{sample(1).key}.one"
    assert not ledger.entries.forget(sample(1).key, "another", quarantined=True)
    assert ledger.entries.forget(sample(1).key, blob, quarantined=True)
    stats = ledger.upkeep.stats("x")
    assert (stats.quarantined, stats.quarantine_entries, stats.quarantine_nbytes) == (1, 1, STORED_NBYTES)
    assert ledger.upkeep.garbage() == [], "a bad one is kept for inspection"


def test_a_models_entries_go_together(ledger: Ledger) -> None:
    store(ledger, sample(1), sample(1, model=OTHER))
    report = ledger.entries.delete_model(OTHER)
    assert (report.records, report.entries, report.nbytes) == (0, 1, 1120) and stored(ledger) == [sample(1).key]
