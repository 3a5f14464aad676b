"""Chunks of 302 MB from one process's pool into another's: on one card, and from one card to the other.

``python -m pytest -m gpu -s tests/gpu/test_hand_over.py`` prints what a chunk takes.
"""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from chunk_store.layout import KVLayout, LayerLayout
from engine.kv.pool import PagedKVPool
from serving.handover.borrower import Borrower
from serving.handover.lent import Refusal
from serving.handover.metrics import BorrowerMetrics
from tests.serving.handover.lender_process import LenderProcess, lender_process, random_planes
from tests.serving.handover.lending import same_bits, until, value

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]

LAYOUT = KVLayout("bfloat16", (LayerLayout(8, 128, 128),) * 36)
TOKENS, CHUNKS, TIMES = 2048, 3, 20
KILLS = 5


class Decode:
    """What borrows: a pool on ``cuda:0``."""

    def __init__(self, lender: LenderProcess) -> None:
        self.pool = PagedKVPool(LAYOUT, pages=2 * TOKENS // 16, chunk_pages=2 * TOKENS // 16, device="cuda:0")
        run = self.pool.allocate_run(TOKENS)
        assert run is not None
        self.planes = self.pool.run_planes(run, TOKENS)
        self.registry = CollectorRegistry()
        metrics = BorrowerMetrics(self.registry, "model")
        self.borrower = Borrower(LAYOUT, self.pool.device, lender.offer, metrics, ask_again_s=0.0)

    def opened(self) -> float:
        """Seconds that opening the other's pool takes."""
        began = time.perf_counter()
        self.borrower.open()
        until(lambda: self.borrower._opening is None)
        outcomes = {
            str(s.labels["outcome"]): s.value
            for f in self.registry.collect()
            for s in f.samples
            if s.name == "cairn_hand_over_sessions_total" and s.value
        }
        assert self.borrower.lenders == 1, f"no session: {outcomes}"
        return time.perf_counter() - began

    def copy(self, lender: LenderProcess, chunk: int) -> tuple[Refusal | None, float]:
        lent = lender.lend(self.borrower.name, chunk)
        launched = torch.cuda.current_stream(self.pool.device).record_event()
        began = time.perf_counter()
        refusal = self.borrower.copy(lent, self.planes, after=launched)
        return refusal, time.perf_counter() - began


def cards() -> list[Any]:
    names = ["cuda:0", "cuda:1"]
    return [pytest.param(name, id=text) for name, text in zip(names, ("one card", "two cards"), strict=True)]


@pytest.mark.parametrize("device", cards())
def test_a_chunk_changes_its_owner_with_its_bits(device: str, tmp_path: Path) -> None:
    if int(device[-1]) >= torch.cuda.device_count():
        pytest.skip("needs two CUDA devices")
    with lender_process(tmp_path, LAYOUT, tokens=TOKENS, chunks=CHUNKS, device=device, kind="spawn") as lender:
        decode = Decode(lender)
        opening_s = decode.opened()
        for chunk in range(CHUNKS):
            refusal, _ = decode.copy(lender, chunk)
            wanted = [plane.to("cuda:0") for plane in random_planes(LAYOUT, TOKENS, chunk, device)]
            assert refusal is None and same_bits(decode.planes, wanted)
            del wanted
        took = [decode.copy(lender, n % CHUNKS)[1] for n in range(TIMES)]
        print(
            f"\nhand-over from {device} to cuda:0, {LAYOUT.nbytes(TOKENS) / 1e6:.0f} MB "
            f"in {2 * len(LAYOUT.layers)} planes: "
            f"best {1e3 * min(took):.2f} ms, median {1e3 * statistics.median(took):.2f} ms with lease and give-back; "
            f"the pool was opened in {1e3 * opening_s:.0f} ms"
        )
        assert value(decode.registry, "cairn_hand_over_chunks_total", outcome="borrowed") == CHUNKS + TIMES
        until(lambda: lender.held() == 0)
        decode.borrower.close()


@pytest.mark.parametrize("device", cards())
def test_a_lender_that_is_killed_while_it_is_copied_from_harms_nobody(device: str, tmp_path: Path) -> None:
    """The borrower finds out, or has the right bits; its own memory and context stay as they are."""
    if int(device[-1]) >= torch.cuda.device_count():
        pytest.skip("needs two CUDA devices")
    wanted = [plane.to("cuda:0") for plane in random_planes(LAYOUT, TOKENS, 0, device)]
    mine = torch.arange(1 << 20, device="cuda:0")
    refusals = []
    for number in range(KILLS):
        with lender_process(tmp_path, LAYOUT, tokens=TOKENS, chunks=1, device=device, kind="spawn") as lender:
            decode = Decode(lender)
            decode.opened()
            lents = [lender.lend(decode.borrower.name, 0) for _ in range(200)]
            killer = threading.Timer(0.005 * number, lender.kill)
            killer.start()
            for lent in lents:
                refusal = decode.borrower.copy(lent, decode.planes)
                if refusal is not None:
                    refusals.append(refusal)
                    break
                assert same_bits(decode.planes, wanted)
            killer.join()
            decode.borrower.close()
            assert torch.equal(mine, torch.arange(1 << 20, device="cuda:0")), "the context is whole"
    print(f"\nkilled {KILLS} lenders on {device}: {refusals}")
    assert len(refusals) == KILLS and set(refusals) <= {Refusal.PEER_GONE, Refusal.NOT_COPIED, Refusal.NO_SESSION}


def test_a_card_that_is_not_seen_is_a_reason(tmp_path: Path) -> None:
    with lender_process(tmp_path, LAYOUT, tokens=16, chunks=1, device="cpu", kind="spawn") as lender:
        decode = Decode(lender)
        decode.borrower.open()
        until(lambda: value(decode.registry, "cairn_hand_over_sessions_total", outcome="not_readable") == 1)
