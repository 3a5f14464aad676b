"""Chunks leave a device while it goes on computing: their bits, their pages, and who was there first."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from chunk_store.entry import EntryHeader
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.landing import Buffers
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.open import open_store
from chunk_store.store import Busy, Stored
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from serving.publishing.metrics import PublicationMetrics
from serving.publishing.publisher import Publisher

pytestmark = pytest.mark.gpu

LAYOUT = KVLayout("bfloat16", (LayerLayout(8, 128, 128),) * 4)
TOKENS, CHUNKS, WAIT_S = 512, 24, 60.0


def test_what_is_stored_has_the_bits_of_what_was_launched_and_its_pages_are_used_again(tmp_path: Path) -> None:
    """The pool holds three chunks of 24, and each is overwritten by work that was launched behind its hand-over."""
    pages = 3 * TOKENS // 16
    pool = PagedKVPool(LAYOUT, pages=pages, chunk_pages=pages, device="cuda")
    residents = ResidentChunks(pool)
    device = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(0,))  # else a product warns
    store = open_store(f"file://{tmp_path}")
    nbytes = LAYOUT.nbytes(TOKENS)
    metrics = PublicationMetrics(CollectorRegistry(), "gpu")
    publisher = Publisher(residents, store, post=device.submit, nbytes_max=4 * nbytes, threads=3, metrics=metrics)
    busy = torch.randn(4096, 4096, device="cuda")

    def header(name: int) -> EntryHeader:
        key = f"{name:064x}"
        return EntryHeader(ChunkKey(key), ChunkId(key), ModelIdentity("gpu"), LAYOUT, (name,) * TOKENS, ())

    def compute(name: int) -> bool:
        """In the device thread: slow work, then the chunk's rows; handed over before any of it has run."""
        if sum(1 for chunk in residents._chunks.values() if chunk.still) >= 3:
            return False
        place = publisher.try_reserve(nbytes)
        if place is None:
            return False
        chunk = residents.reserve(header(name).key, TOKENS)
        for _ in range(20):
            torch.mm(busy, busy)
        for number, plane in enumerate(pool.run_planes(chunk.run, TOKENS)):
            plane.fill_(float(name + 32 * number))
        chunk.ready = True
        claim = store.begin(header(name).key)
        assert not isinstance(claim, Stored | Busy)
        publisher.submit(place, header(name), chunk, publisher.claims.hold(header(name).key, claim))
        residents.release(chunk)
        return True

    for name in range(1, CHUNKS + 1):
        deadline = time.monotonic() + WAIT_S
        while not device.submit(compute, name).result(WAIT_S):
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert publisher.flush(WAIT_S)
    device.submit(lambda: None).result(WAIT_S)
    residents.check_integrity()
    assert residents.held == 0 and publisher.room.taken == 0
    for name in range(1, CHUNKS + 1):
        buffers = [torch.empty(size // 2, dtype=torch.bfloat16) for size in LAYOUT.plane_nbytes(TOKENS)]
        views = [buffer.view(torch.uint8).numpy().data for buffer in buffers]
        assert store.load(header(name).key, header(name).token_ids, views) is None
        for number, buffer in enumerate(buffers):
            assert torch.all(buffer == torch.tensor(float(name + 32 * number), dtype=torch.bfloat16))
    assert publisher.stop(WAIT_S)
    device.shutdown()
    store.close()


def test_what_waits_for_room_in_the_pool_and_what_waits_in_memory_have_their_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes stand still: chunk 1 is in pinned memory and its pages are another's, chunk 2 waits in the pool."""
    pages = 2 * TOKENS // 16
    pool = PagedKVPool(LAYOUT, pages=pages, chunk_pages=pages, device="cuda")
    residents, store, nbytes = ResidentChunks(pool), open_store(f"file://{tmp_path}"), LAYOUT.nbytes(TOKENS)
    device = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(0,))
    metrics = PublicationMetrics(CollectorRegistry(), "gpu")
    publisher = Publisher(residents, store, post=device.submit, nbytes_max=nbytes, threads=1, metrics=metrics)
    write, let_on = store.blobs.write, threading.Event()

    def held(*given: Any) -> None:
        assert let_on.wait(WAIT_S)
        write(*given)

    monkeypatch.setattr(store.blobs, "write", held)
    busy = torch.randn(4096, 4096, device="cuda")

    def header(name: int) -> EntryHeader:
        key = f"{name:064x}"
        return EntryHeader(ChunkKey(key), ChunkId(key), ModelIdentity("gpu"), LAYOUT, (name,) * TOKENS, ())

    def compute(name: int, *, publish: bool) -> Any:
        """In the device thread, behind slow work that has not run when it returns."""
        asked = publisher.ask_behind(nbytes) if publish else None
        chunk = residents.reserve(header(name).key, TOKENS)
        for _ in range(20):
            torch.mm(busy, busy)
        for number, plane in enumerate(pool.run_planes(chunk.run, TOKENS)):
            plane.fill_(float(name + 32 * number))
        chunk.ready = True
        going = None
        if asked is not None:
            claim = store.begin(header(name).key)
            assert not isinstance(claim, Stored | Busy)
            going = publisher.submit(asked, header(name), chunk, publisher.claims.hold(header(name).key, claim))
        residents.release(chunk)
        return going

    def check(buffers: list[torch.Tensor], name: int) -> None:
        for number, buffer in enumerate(buffers):
            assert torch.all(buffer == torch.tensor(float(name + 32 * number), dtype=torch.bfloat16))

    def blank() -> tuple[list[torch.Tensor], list[memoryview]]:
        buffers = [torch.empty(size // 2, dtype=torch.bfloat16) for size in LAYOUT.plane_nbytes(TOKENS)]
        return buffers, [buffer.view(torch.uint8).numpy().data for buffer in buffers]

    first = device.submit(compute, 1, publish=True).result(WAIT_S)
    second = device.submit(compute, 2, publish=True).result(WAIT_S)
    assert second.computed.result(WAIT_S) is None and not second.done()
    deadline = time.monotonic() + WAIT_S
    while not device.submit(residents.evict, header(1).key).result(WAIT_S):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    device.submit(compute, 3, publish=False).result(WAIT_S)  # over the pages of chunk 1
    buffers, views = blank()
    assert publisher.read(header(1).key, Buffers(views))
    check(buffers, 1)
    let_on.set()
    assert first.result(WAIT_S) and second.result(WAIT_S)
    for name in (1, 2):
        buffers, views = blank()
        assert store.load(header(name).key, header(name).token_ids, views) is None
        check(buffers, name)
    assert publisher.stop(WAIT_S)
    device.shutdown()
    store.close()
