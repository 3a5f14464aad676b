"""What is lent stays where it is while its lease holds, and no longer: nobody waits for a borrower."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunk_store.key import ChunkKey
from engine.kv.resident import PoolFull
from serving.handover import leases
from serving.handover.lent import Refusal
from tests.serving.handover.lending import Borrowing, both, interrupt, lending, until


def test_a_lease_that_runs_out_during_the_copy_is_not_used(tmp_path: Path) -> None:
    with both(tmp_path, lease_s=0.05) as (lender, borrowing):
        lent = lender.lend(borrowing.borrower.name, lender.chunk("chunk", 9))
        interrupt(borrowing, lambda: until(lambda: lender.held() == 0))
        assert borrowing.copy(lent)[0] is Refusal.LEASE_LOST
        lender.check_idle()
        assert lender.value("cairn_hand_over_leases_total", end="expired") == 1
        assert borrowing.value("cairn_hand_over_chunks_total", outcome="lease_lost") == 1


def test_a_lease_that_nobody_uses_runs_out(tmp_path: Path) -> None:
    with both(tmp_path, lease_s=0.05) as (lender, borrowing):
        lender.lend(borrowing.borrower.name, lender.chunk("chunk", 9))
        lender.check_idle()
        assert lender.value("cairn_hand_over_leases_total", end="expired") == 1


def test_where_the_pool_needs_the_pages_leases_are_called_back_and_their_copies_not_used(tmp_path: Path) -> None:
    with both(tmp_path, pages=8) as (lender, borrowing):
        first = lender.chunk("first", 20)
        lent = lender.lend(borrowing.borrower.name, first)
        interrupt(borrowing, lambda: lender.chunk("second", 32, seed=2))
        assert borrowing.copy(lent)[0] is Refusal.LEASE_LOST
        assert lender.in_device_thread(lambda: lender.residents.find(ChunkKey("first"))) is None
        assert lender.value("cairn_hand_over_leases_total", end="recalled") == 1
        lender.check_idle()


def test_chunks_that_others_hold_are_not_called_back(tmp_path: Path) -> None:
    with both(tmp_path, pages=8) as (lender, borrowing):
        first = lender.chunk("first", 20)
        lender.in_device_thread(lambda: lender.residents.acquire(first.key))
        lender.lend(borrowing.borrower.name, first)
        with pytest.raises(PoolFull):
            lender.chunk("second", 32)
        lender.in_device_thread(lambda: lender.residents.release(first))
        lender.check_idle()


def test_a_borrower_that_goes_gives_everything_back(tmp_path: Path) -> None:
    with both(tmp_path) as (lender, borrowing):
        for n in range(3):
            lender.lend(borrowing.borrower.name, lender.chunk(f"chunk {n}", 9))
        assert lender.held() == 3
        borrowing.borrower.close()
        lender.check_idle()
        assert lender.value("cairn_hand_over_leases_total", end="session_ended") == 3
        assert lender.value("cairn_hand_over_borrowers") == 0


def test_only_so_many_leases_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with both(tmp_path) as (lender, borrowing):
        lender.lender._leases._leases_max = 2
        chunk = lender.chunk("chunk", 4)
        lents = [lender.lend(borrowing.borrower.name, chunk) for _ in range(3)]
        assert [bool(lent.lease) for lent in lents] == [True, True, False]
        assert borrowing.copy(lents[2])[0] is Refusal.NOT_LENT
        assert leases.LEASES_MAX < 10_000
        assert [borrowing.copy(lent)[0] for lent in lents[:2]] == [None, None]
        lender.check_idle()


def test_nothing_is_lent_to_who_has_no_session(tmp_path: Path) -> None:
    with lending(tmp_path) as lender:
        chunk = lender.chunk("chunk", 4)
        assert lender.lend("somebody", chunk).lease == 0
        assert lender.held() == 0


def test_a_lease_belongs_to_the_session_that_it_was_given_to(tmp_path: Path) -> None:
    with both(tmp_path) as (lender, borrowing):
        other = Borrowing(lender.lender.offer).opened()
        lent = lender.lend(borrowing.borrower.name, lender.chunk("chunk", 4, seed=1))
        assert other.copy(lent)[0] is Refusal.LEASE_LOST, "what is borrowed by others is not asked about"
        assert borrowing.copy(lent)[0] is None
