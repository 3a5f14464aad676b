"""Upkeep of an index: swept, counted, audited, named."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from chunk_store.blobs import Quarantined
from chunk_store.ledger import Ledger
from chunk_store.limits import StoreLimits
from chunk_store.local.index import INDEX
from chunk_store.local.ledger import local_ledger
from chunk_store.tenant import DEFAULT_TENANT, Tenant, tenant_of
from tests.chunk_store.contract import sample
from tests.chunk_store.local.conftest import STORED_NBYTES, store, stored


def test_a_sweep_ends_what_is_over(ledger: Ledger) -> None:
    store(ledger, sample(1), sample(2))
    ledger.claims.claim(sample(3).key, "n", 0.0)
    ledger.leases.hold("a", [sample(1).key], 0.0)
    ledger.records.delete([sample(1).chunk_id])
    ledger.upkeep.set_limits(StoreLimits(capacity_nbytes=STORED_NBYTES - 1))
    report = ledger.upkeep.sweep()
    assert (report.claims, report.records, report.entries, report.nbytes) == (1, 0, 1, STORED_NBYTES)
    assert stored(ledger) == [] and len(ledger.upkeep.garbage()) == 3
    ledger.upkeep.discard(ledger.upkeep.garbage())
    assert ledger.upkeep.garbage() == [] and ledger.upkeep.stats("x").nbytes == 0


def test_a_sweep_learns_what_the_quarantine_holds_and_ends_what_is_old(ledger: Ledger) -> None:
    ledger.upkeep.sweep([Quarantined("new", 100, 4e9), Quarantined("old", 50, 1.0)])
    stats = ledger.upkeep.stats("x")
    assert (stats.quarantine_entries, stats.quarantine_nbytes, ledger.upkeep.garbage()) == (1, 100, ["old"])
    ledger.upkeep.sweep()  # nothing is there any more
    assert ledger.upkeep.stats("x").quarantine_nbytes == 0


def test_counts_are_of_a_tenant_or_of_all(ledger: Ledger) -> None:
    ledger.records.put([sample(1).record(pinned=True), sample(2, salt="a").record()])
    store(ledger, sample(1), sample(2, salt="a"))
    ledger.leases.hold("a", [sample(2, salt="a").key], 30.0)
    stats = ledger.upkeep.stats("kind")
    assert (stats.backend, stats.records, stats.entries, stats.pinned_entries, stats.leased_entries) == (
        "kind",
        2,
        2,
        1,
        1,
    )
    own, other = ledger.upkeep.usage(DEFAULT_TENANT), ledger.upkeep.usage(tenant_of("a"))
    assert (own.records, own.pinned, own.entries, own.nbytes) == (1, 1, 1, STORED_NBYTES)
    assert (own.pinned_entries, own.leased_entries, other.pinned_entries, other.leased_entries) == (1, 0, 0, 1)
    assert ledger.upkeep.usage(Tenant("nobody")).records == 0
    assert set(ledger.upkeep.tenants()) == {DEFAULT_TENANT, tenant_of("a")}


def test_what_does_not_add_up_is_found_and_counted_again(ledger: Ledger, tmp_path: Path) -> None:
    store(ledger, sample(1))
    ledger.records.put([sample(1).record()])
    with closing(sqlite3.connect(tmp_path / INDEX, isolation_level=None)) as connection:
        connection.execute("UPDATE totals SET value = value + 7 WHERE name = 'entry_nbytes'")
        connection.execute("UPDATE tenants SET records = 5")
    assert ledger.upkeep.audit() == [
        f"total entry_nbytes is {STORED_NBYTES + 7}, the rows say {STORED_NBYTES}",
        "the counts of tenants do not agree with their rows",
    ]
    ledger.upkeep.recount()
    assert ledger.upkeep.audit() == [] and ledger.upkeep.usage(DEFAULT_TENANT).records == 1


def test_a_store_keeps_its_name_and_its_limits(ledger: Ledger, tmp_path: Path) -> None:
    ledger.upkeep.set_limits(StoreLimits(records_max=7))
    with closing(local_ledger(tmp_path / INDEX, StoreLimits())) as other:
        assert other.upkeep.identity() == ledger.upkeep.identity() and len(ledger.upkeep.identity()) == 16
        stats = other.upkeep.stats("x")
        assert (stats.capacity_nbytes, stats.records_max) == (3 * STORED_NBYTES, 7)
