"""KV reaches the device through pinned memory whole, while steps run, and comes from the host tier a second time."""

from __future__ import annotations

import threading

import pytest
import torch

from chunk_store.key import ChunkKey
from chunk_store.landing import Landing
from engine.kv.host_tier import HostTier, PoolMemory
from engine.kv.pool import PagedKVPool
from engine.kv.pool_bytes import incoming, outgoing
from engine.kv.resident import ResidentChunks
from engine.kv.source import KVSource
from tests.engine.composer import Composer, Request
from tests.engine.kv.test_host_tier import fill
from tests.gpu.engine_models import served, tokens

pytestmark = pytest.mark.gpu

NAME = "qwen3-ratio4-128"


def test_bytes_that_leave_a_device_and_come_back_are_the_same() -> None:
    layout = served(NAME).layout
    pool = PagedKVPool(layout, pages=16, chunk_pages=16, device="cuda")
    for tensor in (*pool.keys, *pool.values):
        tensor.normal_()
    first, second = pool.allocate_run(50), pool.allocate_run(50)
    assert first is not None and second is not None
    kept = [part.clone() for part in pool.run_planes(first, 50)]
    sent = outgoing(pool, first, 50)
    with incoming(pool, second, 50) as buffers:
        for buffer, source in zip(buffers, sent, strict=True):
            buffer[:] = source
    assert all(torch.equal(a, b) for a, b in zip(kept, pool.run_planes(second, 50), strict=True))


def test_loads_beside_running_steps_change_neither() -> None:
    request: Request = ([tokens(1, 300)], tokens(2, 9), "exact")
    alone = Composer(served(NAME), pages=512).generate([request], 24)[0]
    composer = Composer(served(NAME), pages=512)
    composer.generate([request], 2)
    tier, pool = HostTier(64 << 20, "cuda"), PagedKVPool(served(NAME).layout, pages=128, chunk_pages=128, device="cuda")
    runs = [pool.allocate_run(400) for _ in range(4)]
    origins: list[list[KVSource]] = [[] for _ in runs]
    whole: list[bool] = []

    def load(index: int) -> None:
        run = runs[index]
        assert run is not None
        parts = pool.run_planes(run, 400)

        def read(landing: Landing) -> str | None:
            fill(landing, index + 1)
            return None

        for _ in range(20):
            for part in parts:
                part.zero_()
            torch.cuda.current_stream().synchronize()
            origins[index].append(tier.load(ChunkKey(str(index)), parts, read)[0])
            whole.append(all(bool((part.view(torch.uint8) == index + 1).all()) for part in parts))

    threads = [threading.Thread(target=load, args=(index,)) for index in range(len(runs))]
    for thread in threads:
        thread.start()
    beside = composer.generate([request], 24)[0]
    for thread in threads:
        thread.join()
    assert all(whole) and len(whole) == 80
    assert all(seen == [KVSource.STORE, *[KVSource.HOST] * 19] for seen in origins)
    assert beside[0] == alone[0]
    assert torch.equal(beside[1], alone[1])


def test_a_load_into_pages_whose_last_owner_still_writes_comes_after_it() -> None:
    """A request that has ended has rows in the step that runs; its pages are given to a load at once."""
    residents = ResidentChunks(PagedKVPool(served(NAME).layout, pages=16, chunk_pages=16, device="cuda"))
    chunk = residents.reserve(ChunkKey("new"), 50)
    planes = residents.pool.run_planes(chunk.run, 50)
    read_late = torch.empty_like(planes[0])
    for plane in planes:
        plane.fill_(1.0)
    torch.cuda._sleep(400_000_000)  # cycles of a step that is under way
    read_late.copy_(planes[0])
    for plane in planes:
        plane.fill_(2.0)
    memory = PoolMemory(residents.pool, host_nbytes=1 << 20).of(chunk)

    def read(landing: Landing) -> None:
        fill(landing, 0)

    loading = threading.Thread(target=memory.fill, args=(read,))
    loading.start()
    loading.join(30)
    torch.cuda.synchronize()
    assert bool((read_late == 1.0).all()) and not any(bool(plane.any()) for plane in planes)
