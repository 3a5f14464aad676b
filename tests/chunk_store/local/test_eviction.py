"""What goes from an index, and in which order."""

from __future__ import annotations

from chunk_store.ledger import TOMBSTONES_MAX, Ledger
from chunk_store.local import eviction
from chunk_store.local.index import Index
from tests.chunk_store.contract import sample
from tests.chunk_store.local.conftest import STORED_NBYTES, store, stored


def test_what_was_used_longest_ago_goes_first_and_a_pin_stays(ledger: Ledger) -> None:
    ledger.records.put([sample(1).record(pinned=True)])
    store(ledger, sample(1), sample(2), sample(3))
    ledger.leases.begin_read(sample(2).key)
    ledger.claims.evict(1)
    assert stored(ledger) == [sample(1).key, sample(2).key]
    assert set(ledger.claims.evict(3 * STORED_NBYTES)) == {f"{sample(3).key}.one", f"{sample(2).key}.one"}
    assert stored(ledger) == [sample(1).key] and ledger.upkeep.stats("x").evictions == 2


def test_bad_data_goes_before_good_data(ledger: Ledger) -> None:
    store(ledger, sample(1), sample(2))
    ledger.entries.forget(sample(2).key, f"{sample(2).key}.one", quarantined=True)
    assert ledger.claims.evict(STORED_NBYTES) == [f"{sample(2).key}.one"]
    assert stored(ledger) == [sample(1).key]


def test_an_expired_chunk_goes_with_its_entries_unless_others_need_it(ledger: Ledger) -> None:
    parent, child = sample(1), sample(2, context=[sample(1).key])
    ledger.records.put([parent.record(expires_at=1.0), sample(3).record(expires_at=1.0)])
    store(ledger, parent, child, sample(3))
    report = ledger.upkeep.sweep()
    assert (report.records, report.entries) == (1, 2), "the child was computed under the parent, whose record stays"
    assert stored(ledger) == [child.key]
    ledger.claims.evict(STORED_NBYTES)
    assert ledger.upkeep.sweep().records == 1


def test_tombstones_are_bounded_and_go_when_the_entry_is_back(index: Index) -> None:
    with index.write() as connection:
        connection.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            "INSERT INTO tombstones (key, tenant, chunk_id) SELECT 'k' || i, '', 'c' FROM n",
            (TOMBSTONES_MAX,),
        )
        for number in (1, 2):
            connection.execute(
                "INSERT INTO entries VALUES (?, 'b', 'c', 'm', '', 1, 1, 1, 1, 1, 0)", (sample(number).key,)
            )
        assert eviction.evict(connection, 2, 0.0) == 2
        count = "SELECT COUNT(*) FROM tombstones"
        assert connection.execute(count).fetchone()[0] == TOMBSTONES_MAX
        assert not connection.execute("SELECT 1 FROM tombstones WHERE key IN ('k1', 'k2')").fetchone()
        eviction.unbury(connection, sample(1).key)
        assert connection.execute(count).fetchone()[0] == TOMBSTONES_MAX - 1
