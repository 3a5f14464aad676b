"""Upkeep of a Redis store: its limits, its name, its counts."""

from __future__ import annotations

from chunk_store.ledger import Ledger
from chunk_store.limits import StoreLimits
from chunk_store.redis.connection import RedisConnection
from chunk_store.redis.ledger import redis_ledger
from chunk_store.tenant import DEFAULT_TENANT, tenant_of
from tests.chunk_store.contract import sample
from tests.chunk_store.local.conftest import STORED_NBYTES, store


def test_limits_are_the_stores_and_hold_where_it_has_lost_them(connection: RedisConnection, ledger: Ledger) -> None:
    def limits(of: Ledger) -> tuple[int, int]:
        stats = of.upkeep.stats("x")
        return stats.capacity_nbytes, stats.records_max

    other = redis_ledger(connection, StoreLimits(records_max=7))
    assert limits(other) == limits(ledger) == (3 * STORED_NBYTES, 7)
    connection.client.delete(connection.name("settings"))
    assert limits(ledger) == (3 * STORED_NBYTES, 3)


def test_both_kinds_of_ledger_name_a_store_alike(ledger: Ledger, connection: RedisConnection) -> None:
    name = ledger.upkeep.identity()
    assert len(name) == 16 and redis_ledger(connection, StoreLimits()).upkeep.identity() == name


def test_counts_are_of_a_tenant_or_of_all(ledger: Ledger) -> None:
    ledger.records.put([sample(1).record(pinned=True), sample(2, salt="a").record()])
    store(ledger, sample(1), sample(2, salt="a"))
    own, other = ledger.upkeep.usage(DEFAULT_TENANT), ledger.upkeep.usage(tenant_of("a"))
    assert (own.records, own.pinned, own.entries, own.nbytes, own.pinned_entries) == (1, 1, 1, STORED_NBYTES, 1)
    assert (other.records, other.pinned, other.entries, other.pinned_entries) == (1, 0, 1, 0)
    assert ledger.upkeep.stats("kind").nbytes == 2 * STORED_NBYTES


def test_what_does_not_add_up_is_found_and_counted_again(ledger: Ledger, connection: RedisConnection) -> None:
    store(ledger, sample(1))
    connection.client.hincrby(connection.name("totals"), "entry_nbytes", 7)
    connection.client.delete(connection.name(f"chunk:{sample(1).chunk_id}"))
    assert ledger.upkeep.audit() == [
        f"total entry_nbytes is {STORED_NBYTES + 7}, the rows say {STORED_NBYTES}",
        "rows and lists disagree in 1 places",
    ]
    ledger.upkeep.recount()
    assert ledger.upkeep.audit() == []
