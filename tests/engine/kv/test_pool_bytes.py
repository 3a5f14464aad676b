"""Pages as bytes on the CPU: the buffers are the pages; order, sizes and views."""

from __future__ import annotations

import torch

from chunk_store.key import ChunkKey
from chunk_store.layout import KVLayout, LayerLayout
from engine.kv.host_tier import PoolMemory
from engine.kv.pool import PagedKVPool
from engine.kv.pool_bytes import as_bytes, copy_planes, incoming, outgoing
from engine.kv.resident import ResidentChunks
from engine.kv.source import KVSource
from tests.engine.kv.test_host_tier import fill

LAYOUT = KVLayout("float32", (LayerLayout(1, 2, 3), LayerLayout(2, 1, 1)))


def make_pool() -> PagedKVPool:
    return PagedKVPool(LAYOUT, pages=8, chunk_pages=6, page_size=4)


def test_buffers_are_the_planes_in_layout_order() -> None:
    pool = make_pool()
    run = pool.allocate_run(7)
    assert run is not None
    sent = outgoing(pool, run, 7)
    assert [len(buffer) for buffer in sent] == [7 * 2 * 4, 7 * 3 * 4, 7 * 2 * 4, 7 * 2 * 4]
    pool.values[0][:7] = 2.5
    assert bytes(sent[1]) == torch.full((21,), 2.5).numpy().tobytes(), "a view: it changes with the pages"
    with incoming(pool, run, 7) as buffers:
        buffers[2][:] = torch.full((14,), 7.0).numpy().tobytes()
    assert torch.all(pool.keys[1][:7] == 7.0) and torch.all(pool.keys[1][7:] == 0.0)


def test_bytes_of_a_short_dtype_and_back() -> None:
    planes = [torch.randn(5, 2, 3).bfloat16(), torch.randn(5, 1, 4).bfloat16()]
    taken = [bytes(buffer) for buffer in as_bytes(planes)]
    assert [len(values) for values in taken] == [5 * 6 * 2, 5 * 4 * 2]
    again = [torch.empty_like(plane) for plane in planes]
    for buffer, values in zip(as_bytes(again), taken, strict=True):
        buffer[:] = values
    assert all(torch.equal(a, b) for a, b in zip(planes, again, strict=True))
    copy_planes(again, [torch.zeros_like(plane) for plane in planes])
    assert not any(bool(plane.any()) for plane in again)


def test_loads_of_the_cpu_fill_the_pages_and_stay_nowhere_else() -> None:
    residents = ResidentChunks(make_pool())
    chunk = residents.reserve(ChunkKey("a"), 3)
    memory = PoolMemory(residents.pool, host_nbytes=1 << 20).of(chunk)
    for value in (1, 2):
        assert not memory.held
        source, failure = memory.fill(lambda landing: fill(landing, 0))
        assert source is KVSource.STORE and failure is None
        residents.pool.keys[0][:3] = value
    assert memory.fill(lambda landing: "gone") == (KVSource.STORE, "gone")
