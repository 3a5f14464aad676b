"""Leases in an index: what is held is neither evicted nor deleted."""

from __future__ import annotations

from chunk_store.entry import MissReason
from chunk_store.ledger import Ledger, ReadTicket
from tests.chunk_store.contract import sample
from tests.chunk_store.local.conftest import STORED_NBYTES, store, stored

KEY = sample(1).key


def test_a_held_entry_is_not_evicted_until_the_last_lease_ends(ledger: Ledger) -> None:
    store(ledger, sample(1), sample(2))
    for lease in ("a", "b"):
        ledger.leases.hold(lease, [KEY, sample(9).key], 30.0)
    assert ledger.upkeep.stats("x").leased_entries == 1
    ledger.claims.evict(2 * STORED_NBYTES)
    assert stored(ledger) == [KEY]
    ledger.leases.end("a", [KEY])
    ledger.claims.evict(STORED_NBYTES)
    assert stored(ledger) == [KEY]
    ledger.leases.end("b", [KEY])
    ledger.claims.evict(STORED_NBYTES)
    assert stored(ledger) == []


def test_an_expired_lease_holds_nothing_and_can_be_taken_again(ledger: Ledger) -> None:
    store(ledger, sample(1))
    ledger.leases.hold("a", [KEY], 0.0)
    assert ledger.upkeep.stats("x").leased_entries == 0
    ledger.leases.hold("a", [KEY], 30.0)
    ledger.claims.evict(STORED_NBYTES)
    assert stored(ledger) == [KEY]


def test_a_deleted_entry_is_readable_while_held_and_cannot_be_held_anew(ledger: Ledger) -> None:
    store(ledger, sample(1))
    ledger.leases.hold("a", [KEY], 30.0)
    ledger.records.delete([sample(1).chunk_id])
    assert stored(ledger) == [] and ledger.entries.find([KEY]) == [None]
    assert ledger.leases.begin_read(KEY) == ReadTicket(KEY, f"{KEY}.one")
    ledger.leases.hold("b", [KEY], 30.0)
    ledger.leases.hold("a", [KEY], 30.0)  # its own lease goes on
    ledger.leases.end("a", [KEY])
    assert ledger.leases.begin_read(KEY) is MissReason.NOT_STORED
    assert ledger.upkeep.garbage() == [f"{KEY}.one"]


def test_reading_is_use(ledger: Ledger) -> None:
    store(ledger, sample(1), sample(2))
    ticket = ledger.leases.begin_read(KEY)
    assert isinstance(ticket, ReadTicket)
    ledger.leases.end_read(ticket)
    assert stored(ledger) == [sample(2).key, KEY]
    ledger.claims.evict(2 * STORED_NBYTES)
    assert ledger.leases.begin_read(KEY) is MissReason.EVICTED
