"""Either side is killed, or stopped, in the middle of a hand-over: no wrong byte, no page lost, no long wait."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from chunk_store.layout import KVLayout, LayerLayout
from serving.handover.lent import Refusal
from tests.serving.handover.borrower_process import BorrowerProcess
from tests.serving.handover.lender_process import lender_process, random_planes
from tests.serving.handover.lending import LAYOUT, Borrowing, lending, same_bits, until

KILLS = [5, pytest.param(100, marks=pytest.mark.slow)]
LARGE = KVLayout("bfloat16", (LayerLayout(4, 64, 64),) * 4)  # a copy of 128 tokens takes a while
TOKENS = 128


@pytest.mark.parametrize("kills", KILLS)
def test_borrowers_that_are_killed_give_everything_back(tmp_path: Path, kills: int) -> None:
    moments = random.Random(0)
    with lending(tmp_path, pages=64) as lender:
        chunks = [lender.chunk(f"chunk {n}", 32, seed=n) for n in range(4)]
        for _ in range(kills):
            borrower = BorrowerProcess(lender.lender.offer, LAYOUT)
            for n in range(moments.randrange(1, 12)):
                lent = lender.lend(borrower.name, chunks[n % 4])
                assert lent.lease
                borrower.pipe.send(lent)
            borrower.kill()  # while some are copied, some on their way, some given back
            lender.check_idle()
        ended = {how: lender.value("cairn_hand_over_leases_total", end=how) for how in ("returned", "session_ended")}
        assert ended["session_ended"] > 0, ended
        assert lender.value("cairn_hand_over_borrowers") == 0


@pytest.mark.parametrize("kills", KILLS)
def test_what_is_copied_from_a_lender_that_is_killed_is_right_or_not_used(tmp_path: Path, kills: int) -> None:
    moments = random.Random(1)
    refusals: list[Refusal] = []
    wanted = random_planes(LARGE, TOKENS, 0, "cpu")
    planes = [torch.empty_like(plane) for plane in wanted]
    for _ in range(kills):
        with lender_process(tmp_path, LARGE, tokens=TOKENS, chunks=1) as lender:
            borrowing = Borrowing(lender.offer, layout=LARGE).opened()
            lents = [lender.lend(borrowing.borrower.name, 0) for _ in range(8)]
            kill_at = moments.randrange(8)
            for number, lent in enumerate(lents):
                if number == kill_at:
                    lender.process.kill()  # not waited for: it dies while this one is copied
                refusal = borrowing.borrower.copy(lent, planes)
                if refusal is None:
                    assert same_bits(planes, wanted)
                else:
                    refusals.append(refusal)
            borrowing.borrower.close()
    assert len(refusals) >= kills // 2 and set(refusals) <= {Refusal.PEER_GONE, Refusal.NO_SESSION}
    assert not list(tmp_path.glob("*/*")) or len(list(tmp_path.iterdir())) <= 2, "who comes later cleans up"


def test_a_lender_that_is_stopped_is_not_waited_for(tmp_path: Path) -> None:
    with lender_process(tmp_path, LARGE, tokens=TOKENS, chunks=1) as lender:
        borrowing = Borrowing(lender.offer, layout=LARGE).opened()
        (session,) = borrowing.borrower._sessions.values()
        session._answer_s = 0.3
        lents = [lender.lend(borrowing.borrower.name, 0) for _ in range(3)]
        planes = [torch.empty_like(plane) for plane in random_planes(LARGE, TOKENS, 0, "cpu")]
        lender.signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            found = [borrowing.borrower.copy(lent, planes) for lent in lents]
            assert found == [Refusal.NO_ANSWER, Refusal.NO_SESSION, Refusal.NO_SESSION]
            assert time.monotonic() - began < 20
        finally:
            lender.signal(signal.SIGCONT)
        until(lambda: lender.held() == 0)
        until(lambda: borrowing.borrower.copy(lender.lend(borrowing.borrower.name, 0), planes) is None)  # found again
        borrowing.borrower.close()


def test_a_borrower_that_is_stopped_loses_its_leases(tmp_path: Path) -> None:
    with lending(tmp_path, lease_s=0.2) as lender:
        borrower = BorrowerProcess(lender.lender.offer, LAYOUT)
        try:
            os.kill(borrower.process.pid, signal.SIGSTOP)
            assert lender.lend(borrower.name, lender.chunk("chunk", 8)).lease
            lender.check_idle()
            assert lender.value("cairn_hand_over_leases_total", end="expired") == 1
            os.kill(borrower.process.pid, signal.SIGCONT)
        finally:
            borrower.kill()
