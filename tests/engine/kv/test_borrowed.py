"""Another process's pool: what is opened, what is refused, and copies with the same bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from chunk_store.layout import KVLayout, LayerLayout
from engine.kv.borrowed import NotReadable, open_pool
from engine.kv.exported import ExportedPool, export
from engine.kv.pool import PagedKVPool
from engine.kv.shared_memory import PlanePlace

LAYOUT = KVLayout("bfloat16", (LayerLayout(2, 3, 5), LayerLayout(1, 4, 4)))
CPU = torch.device("cpu")


@pytest.fixture
def pool() -> PagedKVPool:
    made = PagedKVPool(LAYOUT, pages=6, chunk_pages=6, page_size=4, share=True)
    for number, plane in enumerate((*made.keys, *made.values)):
        plane.view(torch.int16).copy_(torch.arange(plane.numel()).view(plane.shape) * 7 + number)
    return made


def opened(pool: PagedKVPool, exported: ExportedPool | None = None, layout: KVLayout = LAYOUT) -> Any:
    assert pool.shared is not None
    return open_pool(exported or export(pool), pool.shared.fd, layout, CPU)


@pytest.mark.parametrize(("first", "tokens"), [(0, 1), (3, 9), (20, 8), (0, 28)])
def test_any_slots_are_copied_with_their_bits(pool: PagedKVPool, first: int, tokens: int) -> None:
    target = PagedKVPool(LAYOUT, pages=8, chunk_pages=8, page_size=16)
    run = target.allocate_run(tokens)
    assert run is not None
    planes = target.run_planes(run, tokens)
    opened(pool).copy(first, tokens, planes)
    for key, value, (found_key, found_value) in zip(
        pool.keys, pool.values, zip(planes[::2], planes[1::2], strict=True), strict=True
    ):
        assert torch.equal(found_key.view(torch.int16), key[first : first + tokens].view(torch.int16))
        assert torch.equal(found_value.view(torch.int16), value[first : first + tokens].view(torch.int16))


@pytest.mark.parametrize(("first", "tokens"), [(-1, 2), (0, 0), (0, 29), (28, 1), (1 << 40, 4)])
def test_slots_that_are_none_are_refused(pool: PagedKVPool, first: int, tokens: int) -> None:
    with pytest.raises(ValueError, match="of a pool of 28"):
        opened(pool).copy(first, tokens, [])


def test_planes_of_another_size_are_refused(pool: PagedKVPool) -> None:
    run = pool.allocate_run(4)
    assert run is not None
    with pytest.raises(ValueError):
        opened(pool).copy(0, 5, [plane.clone() for plane in pool.run_planes(run, 4)])
    with pytest.raises(ValueError):
        opened(pool).copy(0, 4, [plane.clone() for plane in pool.run_planes(run, 4)][:3])


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": KVLayout("float16", LAYOUT.layers).canonical()},
        {"layout": "no layout"},
        {"card": "GPU-7"},
        {"file": ()},
        {"slots": 1 << 40},
        {"file": tuple(PlanePlace(-4096, nbytes) for nbytes in LAYOUT.plane_nbytes(28))},
        {"file": tuple(PlanePlace(1 << 40, nbytes) for nbytes in LAYOUT.plane_nbytes(28))},
        {"file": tuple(PlanePlace(0, nbytes + 1) for nbytes in LAYOUT.plane_nbytes(28))},
    ],
)
def test_a_pool_that_is_not_what_it_should_be_is_not_opened(pool: PagedKVPool, changes: dict[str, Any]) -> None:
    with pytest.raises(NotReadable):
        opened(pool, replace(export(pool), **changes))


def test_without_its_memory_file_a_pool_is_not_opened(pool: PagedKVPool) -> None:
    with pytest.raises(NotReadable, match="no memory file"):
        open_pool(export(pool), None, LAYOUT, CPU)
