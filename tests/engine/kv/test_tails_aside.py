"""Tails in host memory: their bytes come back as they went."""

from __future__ import annotations

import pytest
import torch

from engine.kv.pool import PagedKVPool
from engine.kv.tails_aside import POOLS, TailsAside
from tests.fakes import LAYOUT


@pytest.fixture
def pool() -> PagedKVPool:
    made = PagedKVPool(LAYOUT, pages=12, chunk_pages=4, page_size=4)
    for plane in made.planes:
        plane.copy_(torch.randn_like(plane.float()))
    return made


def content(pool: PagedKVPool, pages: tuple[int, ...]) -> list[torch.Tensor]:
    size = pool.page_size
    return [torch.cat([plane[page * size : (page + 1) * size] for page in pages]) for plane in pool.planes]


def test_bytes_come_back_into_other_pages(pool: PagedKVPool) -> None:
    aside = TailsAside(pool, 1 << 20)
    one, two = (7, 4, 9), (11, 5)
    before, other = content(pool, one), content(pool, two)
    for pages in (one, two):
        run = aside.table.allocate_run(len(pages) * 4 - 1)
        assert run is not None
        aside.put(pages, run)
    first, second = aside.table.runs
    for plane in pool.planes:
        plane.zero_()
    aside.bring_back(second, (6, 7, 8))
    aside.bring_back(first, (9, 11, 10, 4))
    assert all(map(torch.equal, content(pool, (9, 11, 10)), before))
    assert all(map(torch.equal, content(pool, (6, 7)), other))
    assert not any(plane[8 * 4 : 9 * 4].any() for plane in pool.planes), "what is behind a tail is left alone"


def test_it_has_as_many_pages_as_fit_and_no_more_than_are_of_use(pool: PagedKVPool) -> None:
    page = LAYOUT.nbytes(pool.page_size)
    assert TailsAside(pool, 0).table.pages == 0
    assert TailsAside(pool, 3 * page - 1).table.pages == 2
    assert TailsAside(pool, 1 << 40).table.pages == POOLS * 8
