"""A chunk from one pool into another: the same bits while the lease holds, a reason where it does not."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from chunk_store.layout import KVLayout, LayerLayout
from serving.handover.lent import Lent, Refusal
from tests.serving.handover.lending import LAYOUT, Borrowing, bits, both, interrupt, lending, same_bits, until


def test_a_chunk_comes_with_its_bits_and_is_given_back(tmp_path: Path) -> None:
    with both(tmp_path) as (lender, borrowing):
        for tokens in (1, 3, 4, 9, 32):
            chunk = lender.chunk(f"chunk of {tokens}", tokens, seed=tokens)
            lent = lender.lend(borrowing.borrower.name, chunk)
            assert lent.lease and lent.tokens == tokens and lender.held() == 1
            refusal, planes = borrowing.copy(lent)
            assert refusal is None
            assert same_bits(planes, bits(tokens, tokens))
            lender.check_idle()
        assert borrowing.value("cairn_hand_over_chunks_total", outcome="borrowed") == 5
        assert lender.value("cairn_hand_over_leases_total", end="returned") == 5
        assert borrowing.value("cairn_hand_over_sessions_total", outcome="opened") == 1


def test_many_threads_borrow_at_once(tmp_path: Path) -> None:
    with both(tmp_path, pages=64) as (lender, borrowing):
        wrong: list[object] = []
        chunks = [lender.chunk(f"chunk {n}", 8, seed=n) for n in range(4)]

        def borrow(n: int) -> None:
            for _ in range(25):
                lent = lender.lend(borrowing.borrower.name, chunks[n])
                planes = [torch.empty_like(plane) for plane in bits(8, n)]
                if borrowing.borrower.copy(lent, planes) is not None or not same_bits(planes, bits(8, n)):
                    wrong.append(lent)

        threads = [threading.Thread(target=borrow, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not wrong
        lender.check_idle()


def test_pages_may_be_of_another_size(tmp_path: Path) -> None:
    with lending(tmp_path) as lender:
        borrowing = Borrowing(lender.lender.offer, page_size=16).opened()
        lent = lender.lend(borrowing.borrower.name, lender.chunk("chunk", 9, seed=1))
        refusal, planes = borrowing.copy(lent)
        assert refusal is None and same_bits(planes, bits(9, 1))


def test_a_lender_that_goes_is_found_out(tmp_path: Path) -> None:
    with both(tmp_path) as (lender, borrowing):
        lent = lender.lend(borrowing.borrower.name, lender.chunk("chunk", 9))
        interrupt(borrowing, lender.stop)
        assert borrowing.copy(lent)[0] is Refusal.PEER_GONE
        assert borrowing.copy(lent)[0] is Refusal.NO_SESSION


def test_a_lender_that_has_gone_is_not_copied_from(tmp_path: Path) -> None:
    with both(tmp_path) as (lender, borrowing):
        lent = lender.lend(borrowing.borrower.name, lender.chunk("chunk", 9))
        lender.stop()
        until(lambda: borrowing.borrower.lenders == 0)
        assert borrowing.copy(lent)[0] is Refusal.NO_SESSION


def test_a_lender_that_does_not_answer_is_waited_for_once_and_not_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with both(tmp_path) as (lender, borrowing):
        (session,) = borrowing.borrower._sessions.values()
        session._answer_s = 0.2
        lents = [lender.lend(borrowing.borrower.name, lender.chunk(f"chunk {n}", 9)) for n in range(2)]
        release = threading.Event()
        monkeypatch.setattr(lender.lender, "give_back", lambda *_: release.wait(20) and False)
        try:
            assert borrowing.copy(lents[0])[0] is Refusal.NO_ANSWER
            assert borrowing.copy(lents[1])[0] is Refusal.NO_SESSION, "and nobody waits for it again"
        finally:
            release.set()
        lender.check_idle()


@pytest.mark.parametrize(("first", "tokens"), [(10_000, 4), (-1, 4), (60, 1000)])
def test_slots_that_the_pool_does_not_have_are_not_read(tmp_path: Path, first: int, tokens: int) -> None:
    with both(tmp_path) as (lender, borrowing):
        lent = lender.lend(borrowing.borrower.name, lender.chunk("chunk", 4))
        planes = bits(tokens, 0)
        wrong = Lent(lent.pool, lent.lease, first, tokens)
        assert borrowing.borrower.copy(wrong, planes) is Refusal.NOT_COPIED
        lender.check_idle()


@pytest.mark.parametrize(
    "layout",
    [
        KVLayout("float16", LAYOUT.layers),
        KVLayout("bfloat16", LAYOUT.layers[:1]),
        KVLayout("bfloat16", (LayerLayout(2, 3, 5), LayerLayout(1, 4, 5))),
    ],
)
def test_a_pool_of_another_layout_is_not_opened(tmp_path: Path, layout: KVLayout) -> None:
    with lending(tmp_path) as lender:
        borrowing = Borrowing(lender.lender.offer, layout=layout, ask_again_s=60)
        borrowing.borrower.open()
        until(lambda: borrowing.value("cairn_hand_over_sessions_total", outcome="not_readable") == 1)
        until(lambda: lender.value("cairn_hand_over_borrowers") == 0)
        assert borrowing.copy(lender.lend(borrowing.borrower.name, lender.chunk("chunk", 4)))[0] is Refusal.NO_SESSION
        lender.check_idle()


def test_a_session_is_looked_for_again_after_the_lender_was_replaced(tmp_path: Path) -> None:
    with both(tmp_path) as (first, borrowing):
        first.stop()
        with lending(tmp_path) as second:
            borrowing.borrower._ask = second.lender.offer
            chunk = second.chunk("chunk", 4, seed=3)
            lent = second.lend(borrowing.borrower.name, chunk)
            assert borrowing.copy(lent)[0] is Refusal.NO_SESSION
            until(lambda: bool(second.lend(borrowing.borrower.name, chunk).lease))
            refusal, planes = borrowing.copy(second.lend(borrowing.borrower.name, chunk))
            assert refusal is None and same_bits(planes, bits(4, 3))


def test_of_several_lenders_behind_one_address_each_is_found(tmp_path: Path) -> None:
    with lending(tmp_path) as one, lending(tmp_path) as two, lending(tmp_path) as three:
        lenders, asked = [one, two, three], iter(range(1000))
        borrowing = Borrowing(lambda name: lenders[next(asked) % 3].lender.offer(name)).opened()
        for n, lender in enumerate(lenders):
            chunk = lender.chunk("chunk", 4, seed=n)

            def borrowed(lender: Any = lender, chunk: Any = chunk, n: int = n) -> bool:
                refusal, planes = borrowing.copy(lender.lend(borrowing.borrower.name, chunk))
                return refusal is None and same_bits(planes, bits(4, n))

            until(borrowed)
        assert borrowing.borrower.lenders == 3
        borrowing.borrower.close()


def test_who_cannot_be_opened_is_not_asked_all_the_time(tmp_path: Path) -> None:
    asked: list[float] = []

    def ask(name: str) -> Any:
        asked.append(time.monotonic())
        raise RuntimeError("what nobody expected")

    borrowing = Borrowing(ask, ask_again_s=60)
    for _ in range(20):
        assert borrowing.copy(Lent("pool", 1, 0, 4))[0] is Refusal.NO_SESSION
        until(lambda: borrowing.borrower._opening is None)
    assert len(asked) == 1
