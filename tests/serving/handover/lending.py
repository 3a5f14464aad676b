"""A pool whose chunks are lent, with a device thread of its own, and a borrower of it; over a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from chunk_store.key import ChunkKey
from chunk_store.layout import KVLayout, LayerLayout
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunk, ResidentChunks
from serving.handover.borrower import Borrower
from serving.handover.lender import Lender
from serving.handover.lent import Lent, Offer, Refusal
from serving.handover.metrics import BorrowerMetrics, LenderMetrics

T = TypeVar("T")
LAYOUT = KVLayout("bfloat16", (LayerLayout(2, 3, 5), LayerLayout(1, 4, 4)))
DEADLINE_S = 30.0


def make_pool(*, share: bool, pages: int = 16, page_size: int = 4, layout: KVLayout = LAYOUT) -> PagedKVPool:
    return PagedKVPool(layout, pages=pages, chunk_pages=pages, page_size=page_size, share=share)


class Lending:
    """What a prefill service has of it: pool, residents, device thread, lender."""

    def __init__(self, directory: Path, *, lease_s: float = 30.0, uid: int | None = None, pages: int = 16) -> None:
        self.pool = make_pool(share=True, pages=pages)
        self.residents = ResidentChunks(self.pool)
        self.registry = CollectorRegistry()
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self.lender = Lender(
            self.residents,
            self._post,
            LenderMetrics(self.registry, "model"),
            lease_s=lease_s,
            directory=directory,
            uid=uid,
        )
        self.lender.start()

    def _post(self, step: Callable[[], None]) -> None:
        self._device.submit(step)

    def in_device_thread(self, step: Callable[[], T]) -> T:
        return self._device.submit(step).result(DEADLINE_S)

    def chunk(self, name: str, tokens: int, seed: int = 0) -> ResidentChunk:
        """A resident chunk of random bits, that nobody holds."""

        def fill() -> ResidentChunk:
            chunk = self.residents.reserve(ChunkKey(name), tokens)
            for plane, wanted in zip(self.pool.run_planes(chunk.run, tokens), bits(tokens, seed), strict=True):
                plane.copy_(wanted)
            chunk.ready = True
            self.residents.release(chunk)
            return chunk

        return self.in_device_thread(fill)

    def lend(self, borrower: str, chunk: ResidentChunk) -> Lent:
        return self.in_device_thread(lambda: self.lender.lend(borrower, chunk))

    def held(self) -> int:
        return self.in_device_thread(lambda: self.residents.held)

    def check_idle(self) -> None:
        """Nothing is lent any more, and every page has its owner."""
        until(lambda: self.held() == 0)
        self.in_device_thread(self.residents.check_integrity)
        assert self.value("cairn_hand_over_leased_chunks") == 0

    def value(self, name: str, **labels: str) -> float:
        return value(self.registry, name, **labels)

    def stop(self) -> None:
        self.lender.stop()
        self._device.shutdown()


class Borrowing:
    """What a decode service has of it: a pool of its own, and a borrower."""

    def __init__(
        self,
        ask: Callable[[str], Offer],
        *,
        layout: KVLayout = LAYOUT,
        page_size: int = 4,
        uid: int | None = None,
        ask_again_s: float = 0.0,
    ) -> None:
        self.pool = make_pool(share=False, page_size=page_size, layout=layout)
        self.registry = CollectorRegistry()
        self.borrower = Borrower(
            layout,
            self.pool.device,
            ask,
            BorrowerMetrics(self.registry, "model"),
            ask_again_s=ask_again_s,
            uid=uid,
        )

    def opened(self) -> Borrowing:
        self.borrower.open()
        until(lambda: self.borrower.lenders > 0)
        return self

    def copy(self, lent: Lent) -> tuple[Refusal | None, list[Tensor]]:
        run = self.pool.allocate_run(lent.tokens)
        assert run is not None
        try:
            planes = self.pool.run_planes(run, lent.tokens)
            refusal = self.borrower.copy(lent, planes)
            return refusal, [plane.clone() for plane in planes]
        finally:
            self.pool.release_run(run)

    def value(self, name: str, **labels: str) -> float:
        return value(self.registry, name, **labels)


@contextmanager
def lending(directory: Path, **options: Any) -> Iterator[Lending]:
    made = Lending(directory, **options)
    try:
        yield made
    finally:
        made.stop()


@contextmanager
def both(directory: Path, **options: Any) -> Iterator[tuple[Lending, Borrowing]]:
    """A lender and a borrower that has its pool open."""
    with lending(directory, **options) as lender:
        borrower = Borrowing(lender.lender.offer).opened()
        try:
            yield lender, borrower
        finally:
            borrower.borrower.close()


def bits(tokens: int, seed: int, layout: KVLayout = LAYOUT) -> list[Tensor]:
    """Planes of a chunk, of any bits that no arithmetic would keep."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, (nbytes,), generator=generator, dtype=torch.uint8)
        .view(torch.bfloat16)
        .view(tokens, *rest)
        for nbytes, rest in zip(
            layout.plane_nbytes(tokens),
            [(la.kv_heads, dim) for la in layout.layers for dim in (la.k_dim, la.v_dim)],
            strict=True,
        )
    ]


def same_bits(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, wanted, strict=True))


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    """The sum of a metric's samples that bear ``labels``."""
    samples = [sample for family in registry.collect() for sample in family.samples if sample.name == name]
    assert samples, f"no metric {name}"
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def until(holds: Callable[[], bool], timeout_s: float = DEADLINE_S) -> None:
    ends_at = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < ends_at, "the condition did not come about"
        threading.Event().wait(0.005)


class Slow:
    """A pool in the middle of whose copies something happens."""

    def __init__(self, pool: Any, meanwhile: Any) -> None:
        self.pool, self.meanwhile = pool, meanwhile

    def copy(self, first_slot: int, tokens: int, targets: Sequence[Tensor], **options: Any) -> None:
        self.pool.copy(first_slot, tokens, targets, **options)
        self.meanwhile()


def interrupt(borrowing: Borrowing, meanwhile: Any) -> None:
    """``meanwhile`` is called before a copy is over."""
    (session,) = borrowing.borrower._sessions.values()
    session._pool = Slow(session._pool, meanwhile)  # type: ignore[assignment]
