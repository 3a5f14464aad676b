"""Claims in an index: one writer for a key, space reserved before it is taken."""

from __future__ import annotations

import os

import pytest

from chunk_store.errors import ClaimLost, QuotaFull, StoreFull
from chunk_store.ledger import Ledger
from chunk_store.limits import Space
from chunk_store.store import Busy, Stored
from tests.chunk_store.contract import sample
from tests.chunk_store.local.conftest import STORED_NBYTES, store, stored

KEY = sample(1).key


def test_one_of_two_writers_gets_the_claim_and_both_see_what_was_committed(ledger: Ledger) -> None:
    assert ledger.claims.claim(KEY, "one", 30.0) is None
    busy = ledger.claims.claim(KEY, "two", 30.0)
    assert isinstance(busy, Busy) and 0 < busy.retry_after_s <= 30.0
    assert ledger.claims.unfinished() == [f"{KEY}.one"]
    ledger.claims.reserve(KEY, "one", Space(STORED_NBYTES), [])
    info = ledger.claims.commit(KEY, "one", sample(1).header)
    assert ledger.claims.claim(KEY, "two", 30.0) == Stored(info)
    assert ledger.claims.unfinished() == [] and not ledger.claims.drop(KEY, "one")


def test_an_expired_claim_is_taken_and_lost_to_whoever_had_it(ledger: Ledger) -> None:
    ledger.claims.claim(KEY, "one", 0.0)
    assert ledger.claims.claim(KEY, "two", 30.0) is None
    assert ledger.upkeep.garbage() == [f"{KEY}.one"], "it may have been half written"
    for late in (
        lambda: ledger.claims.reserve(KEY, "one", Space(1), []),
        lambda: ledger.claims.commit(KEY, "one", sample(1).header),
    ):
        with pytest.raises(ClaimLost, match="begin again"):
            late()
    assert ledger.claims.renew([(KEY, "one"), (KEY, "two")], 30.0) == [False, True]


def test_a_claim_of_a_dead_process_is_taken_at_once(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.claims.claim(KEY, "one", 300.0)
    monkeypatch.setattr("chunk_store.local.claims.is_dead", lambda claimant: str(os.getpid()) in claimant)
    assert ledger.claims.claim(KEY, "two", 30.0) is None


def test_space_is_made_by_evicting_and_reserved_when_the_garbage_is_gone(ledger: Ledger) -> None:
    store(ledger, sample(1), sample(2), sample(3))
    ledger.claims.claim(sample(4).key, "n", 30.0)
    garbage = ledger.claims.reserve(sample(4).key, "n", Space(STORED_NBYTES), [])
    assert garbage == [f"{KEY}.one"] and stored(ledger) == [sample(2).key, sample(3).key]
    assert ledger.claims.reserve(sample(4).key, "n", Space(STORED_NBYTES), garbage) == []
    assert ledger.upkeep.stats("x").nbytes == 3 * STORED_NBYTES, "a reservation counts"
    ledger.claims.drop(sample(4).key, "n")
    assert ledger.upkeep.garbage() == [f"{sample(4).key}.n"]


def test_what_does_not_fit_evicts_nothing(ledger: Ledger) -> None:
    store(ledger, sample(1), sample(2), sample(3))
    ledger.leases.hold("lease", [sample(2).key], 30.0)
    ledger.claims.claim(sample(4).key, "n", 30.0)
    for nbytes, words in (
        (3 * STORED_NBYTES, "pinned, leased"),
        (4 * STORED_NBYTES, "larger than the store's capacity"),
    ):
        with pytest.raises(StoreFull, match=words):
            ledger.claims.reserve(sample(4).key, "n", Space(nbytes), [])
    with pytest.raises(QuotaFull, match="quota bytes: the tenant may have 10"):
        ledger.claims.reserve(sample(4).key, "n", Space(11, tenant_nbytes_max=10), [])
    assert len(stored(ledger)) == 3


def test_what_is_being_written_counts_toward_the_tenants_quota(ledger: Ledger) -> None:
    most = 2 * STORED_NBYTES
    store(ledger, sample(1))
    for number, fits in ((2, True), (3, False)):
        ledger.claims.claim(sample(number).key, "n", 30.0)
        space = Space(STORED_NBYTES, tenant_nbytes_max=most)
        if fits:
            assert ledger.claims.reserve(sample(number).key, "n", space, []) == []
            continue
        with pytest.raises(QuotaFull):
            ledger.claims.reserve(sample(number).key, "n", space, [])


def test_a_full_medium_evicts_whatever_the_capacity(ledger: Ledger) -> None:
    store(ledger, sample(1), sample(2))
    assert ledger.claims.evict(1) == [f"{KEY}.one"]
    assert stored(ledger) == [sample(2).key]
