"""Claims in Redis: every step may run twice, and space is made in the order of use."""

from __future__ import annotations

import pytest

from chunk_store.errors import StoreFull, StoreUnavailable
from chunk_store.ledger import Ledger
from chunk_store.limits import Space
from chunk_store.redis.connection import RedisConnection
from chunk_store.store import Busy
from tests.chunk_store.contract import sample
from tests.chunk_store.local.conftest import STORED_NBYTES, store, stored

KEY = sample(1).key


def test_a_claim_whose_answer_got_lost_is_still_ours(ledger: Ledger) -> None:
    assert ledger.claims.claim(KEY, "one", 30.0) is None and ledger.claims.claim(KEY, "one", 30.0) is None
    assert ledger.claims.reserve(KEY, "one", Space(STORED_NBYTES), []) == []
    first = ledger.claims.commit(KEY, "one", sample(1).header)
    assert ledger.claims.commit(KEY, "one", sample(1).header) == first
    assert ledger.claims.renew([(KEY, "one")], 30.0) == [False]


def test_space_is_made_in_the_order_of_use(ledger: Ledger) -> None:
    store(ledger, sample(1), sample(2), sample(3))
    ledger.leases.begin_read(KEY)
    store(ledger, sample(4))
    assert set(stored(ledger)) == {KEY, sample(3).key, sample(4).key}
    with pytest.raises(StoreFull, match="larger than the store's capacity"):
        ledger.claims.claim(sample(5).key, "n", 30.0)
        ledger.claims.reserve(sample(5).key, "n", Space(4 * STORED_NBYTES), [])


def test_a_claim_of_a_dead_process_is_taken_at_once(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ledger.claims.claim(KEY, "one", 300.0) is None
    assert isinstance(ledger.claims.claim(KEY, "two", 30.0), Busy)
    monkeypatch.setattr("chunk_store.redis.claims.is_dead", lambda claimant: True)
    assert ledger.claims.claim(KEY, "two", 30.0) is None and ledger.upkeep.garbage() == [f"{KEY}.one"]


def test_an_entry_in_no_list_is_damage_that_names_its_remedy(ledger: Ledger, connection: RedisConnection) -> None:
    store(ledger, sample(1))
    connection.client.delete(connection.name("used"))
    with pytest.raises(StoreUnavailable, match=r"in no list.*verify --repair"):
        ledger.claims.claim(KEY, "two", 30.0)
