"""Leases in Redis: of those who hold, and of those who read."""

from __future__ import annotations

from chunk_store.entry import MissReason
from chunk_store.ledger import Ledger, ReadTicket
from tests.chunk_store.contract import sample
from tests.chunk_store.local.conftest import STORED_NBYTES, store, stored

KEY = sample(1).key


def test_a_reader_holds_what_it_reads(ledger: Ledger) -> None:
    store(ledger, sample(1))
    ticket = ledger.leases.begin_read(KEY)
    assert isinstance(ticket, ReadTicket)
    ledger.records.delete([sample(1).chunk_id])
    assert ledger.upkeep.garbage() == [], "values, unlike open files, vanish when they are deleted"
    ledger.leases.end_read(ticket)
    assert ledger.upkeep.garbage() == [f"{KEY}.one"] and ledger.leases.begin_read(KEY) is MissReason.NOT_STORED


def test_a_held_entry_is_not_evicted_until_the_last_lease_ends(ledger: Ledger) -> None:
    store(ledger, sample(1), sample(2))
    for lease in ("a", "b"):
        ledger.leases.hold(lease, [KEY, sample(9).key], 30.0)
    assert ledger.upkeep.stats("x").leased_entries == 1
    ledger.leases.end("a", [KEY])
    ledger.claims.evict(2 * STORED_NBYTES)
    assert stored(ledger) == [KEY]
    ledger.leases.end("b", [KEY])
    ledger.claims.evict(STORED_NBYTES)
    assert stored(ledger) == []
