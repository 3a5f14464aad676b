"""The ledger on a Redis server: opened, brought up to date, and one script a step that may run twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chunk_store.entry import MissReason
from chunk_store.errors import ClaimLost, StoreFull, StoreTooNew
from chunk_store.format.versions import REDIS_VERSION
from chunk_store.ledger import Ledger, ReadTicket
from chunk_store.limits import Space, StoreLimits
from chunk_store.redis.connection import RedisConnection, parse_redis_url
from chunk_store.redis.ledger import redis_ledger
from tests.chunk_store.contract import sample
from tests.chunk_store.local.conftest import STORED_NBYTES, store, stored
from tests.chunk_store.servers import Server, redis_url

KEY = sample(1).key


@pytest.fixture
def connection(shared_redis: Server, tmp_path: Path) -> Iterator[RedisConnection]:
    opened = RedisConnection(parse_redis_url(redis_url(shared_redis, f"ledger-{tmp_path.name}")))
    yield opened
    opened.close()


@pytest.fixture
def ledger(connection: RedisConnection) -> Ledger:
    return redis_ledger(connection, StoreLimits(3 * STORED_NBYTES, 3))


def test_a_store_of_newer_software_is_left_alone(connection: RedisConnection, ledger: Ledger) -> None:
    connection.client.hset(connection.name("settings"), "version", REDIS_VERSION + 1)
    with pytest.raises(StoreTooNew, match=f"version {REDIS_VERSION + 1}.*use the newer one"):
        redis_ledger(connection, StoreLimits())


def test_limits_are_the_stores_and_hold_where_it_has_lost_them(connection: RedisConnection, ledger: Ledger) -> None:
    def limits(of: Ledger) -> tuple[int, int]:
        stats = of.upkeep.stats("x")
        return stats.capacity_nbytes, stats.records_max

    other = redis_ledger(connection, StoreLimits(records_max=7))
    assert limits(other) == limits(ledger) == (3 * STORED_NBYTES, 7)
    connection.client.delete(connection.name("settings"))
    assert limits(ledger) == (3 * STORED_NBYTES, 3)


def test_a_claim_whose_answer_got_lost_is_still_ours(ledger: Ledger) -> None:
    assert ledger.claims.claim(KEY, "one", 30.0) is None and ledger.claims.claim(KEY, "one", 30.0) is None
    assert ledger.claims.reserve(KEY, "one", Space(STORED_NBYTES), []) == []
    first = ledger.claims.commit(KEY, "one", sample(1).header)
    assert ledger.claims.commit(KEY, "one", sample(1).header) == first
    with pytest.raises(ClaimLost):
        ledger.claims.renew(KEY, "one", 30.0)


def test_a_reader_holds_what_it_reads(ledger: Ledger) -> None:
    store(ledger, sample(1))
    ticket = ledger.leases.begin_read(KEY)
    assert isinstance(ticket, ReadTicket)
    ledger.records.delete([sample(1).chunk_id])
    assert ledger.upkeep.garbage() == [], "values, unlike open files, vanish when they are deleted"
    ledger.leases.end_read(ticket)
    assert ledger.upkeep.garbage() == [f"{KEY}.one"] and ledger.leases.begin_read(KEY) is MissReason.NOT_STORED


def test_space_is_made_in_the_order_of_use(ledger: Ledger) -> None:
    store(ledger, sample(1), sample(2), sample(3))
    ledger.leases.begin_read(KEY)
    store(ledger, sample(4))
    assert set(stored(ledger)) == {KEY, sample(3).key, sample(4).key}
    with pytest.raises(StoreFull, match="larger than the store's capacity"):
        ledger.claims.claim(sample(5).key, "n", 30.0)
        ledger.claims.reserve(sample(5).key, "n", Space(4 * STORED_NBYTES), [])


def test_both_kinds_of_ledger_name_a_store_alike(ledger: Ledger, connection: RedisConnection) -> None:
    name = ledger.upkeep.identity()
    assert len(name) == 16 and redis_ledger(connection, StoreLimits()).upkeep.identity() == name
