"""Records in an index: registered once, changed by registering again, deleted with their entries."""

from __future__ import annotations

from chunk_store.ledger import Ledger
from chunk_store.record import RecordQuery
from chunk_store.tenant import tenant_of
from tests.chunk_store.contract import sample
from tests.chunk_store.local.conftest import store

FIRST = sample(1).chunk_id


def test_registering_again_adds_to_what_is_known(ledger: Ledger) -> None:
    assert ledger.records.put([sample(1).record(name="one", tags=("a", "a"))]) == [True]
    assert ledger.records.put([sample(1).record(tags=("b",), pinned=True, expires_at=5e9)]) == [False]
    (found,) = ledger.records.get([FIRST])
    assert found is not None and (found.name, found.tags, found.pinned, found.expires_at) == (
        "one",
        ("a", "b"),
        True,
        5e9,
    )
    for tag in ("a", "b"):
        assert [record.chunk_id for record in ledger.records.page(RecordQuery(tag=tag)).records] == [FIRST]


def test_what_passed_through_changes_nothing_and_stays_when_it_is_registered(ledger: Ledger) -> None:
    ledger.records.put([sample(1).record(name="one"), sample(2).record(transient=True)])
    assert ledger.records.put([sample(1).record(name="two", transient=True), sample(2).record()]) == [False, False]
    found = ledger.records.get([FIRST, sample(2).chunk_id])
    assert [record and (record.name, record.transient) for record in found] == [("one", False), ("", False)]


def test_an_expired_record_is_gone_and_a_pin_suspends_it(ledger: Ledger) -> None:
    ledger.records.put([sample(1).record(expires_at=1.0), sample(2).record(expires_at=1.0, pinned=True)])
    assert [record is not None for record in ledger.records.get([FIRST, sample(2).chunk_id])] == [False, True]
    assert ledger.records.put([sample(1).record()]) == [True]


def test_pins_are_set_where_the_chunk_is_known(ledger: Ledger) -> None:
    ledger.records.put([sample(1).record()])
    assert ledger.records.set_pinned([FIRST, sample(2).chunk_id], True) == [True, False]
    assert ledger.records.set_pinned([FIRST], True, tenant_of("a")) == [False]
    assert ledger.upkeep.usage(tenant_of("")).pinned == 1


def test_a_record_goes_with_its_entries(ledger: Ledger) -> None:
    ledger.records.put([sample(1).record(tags=("a",)), sample(1, salt="a").record()])
    store(ledger, sample(1), sample(1, salt="a"))
    report = ledger.records.delete([FIRST, sample(3).chunk_id])
    assert (report.records, report.entries, report.nbytes) == (1, 1, 1120)
    assert ledger.records.get([FIRST], None)[0] is not None, "the other tenant's stays"
    assert ledger.records.delete([FIRST], None).records == 1 and ledger.upkeep.audit() == []
