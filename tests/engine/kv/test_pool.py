"""The pool's bytes: views of a run in entry order, and a run that moves with its bytes."""

from __future__ import annotations

import pytest
import torch

from chunk_store.layout import KVLayout, LayerLayout
from engine.kv.pool import PagedKVPool

LAYOUT = KVLayout("bfloat16", (LayerLayout(2, 3, 5), LayerLayout(1, 4, 4)))


def pool() -> PagedKVPool:
    return PagedKVPool(LAYOUT, pages=6, chunk_pages=4, page_size=4)


def test_planes_are_views_in_entry_order_with_the_layouts_bytes() -> None:
    made = pool()
    run = made.allocate_run(6)
    assert run is not None
    planes = made.run_planes(run, 6)
    assert [tuple(plane.shape) for plane in planes] == [(6, 2, 3), (6, 2, 5), (6, 1, 4), (6, 1, 4)]
    assert [plane.nbytes for plane in planes] == list(LAYOUT.plane_nbytes(6))
    assert all(plane.is_contiguous() and plane.dtype == torch.bfloat16 for plane in planes)
    planes[1][5] = 7.0
    assert made.values[0][run.first * 4 + 5].eq(7).all(), "a view, not a copy"


def test_a_run_moves_with_its_bytes_also_over_itself() -> None:
    made = pool()
    first, second = made.allocate_run(4), made.allocate_run(12)
    assert first is not None and second is not None
    for number, plane in enumerate(made.run_planes(second, 12)):
        plane.copy_((torch.arange(12) + number).view(12, 1, 1).expand_as(plane))
    before = [plane.clone() for plane in made.run_planes(second, 12)]
    made.release_run(first)
    moved = made.move_run(second, 0)
    assert moved.first == 0
    for plane, old in zip(made.run_planes(moved, 12), before, strict=True):
        assert torch.equal(plane, old)


def test_a_tail_becomes_a_run_page_by_page() -> None:
    made = PagedKVPool(LAYOUT, pages=9, chunk_pages=4, page_size=4)
    for number, tensor in enumerate((*made.keys, *made.values)):
        tensor.copy_((torch.arange(40) + number).view(40, 1, 1).expand_as(tensor))
    run = made.allocate_run(11)
    assert run is not None
    made.copy_tail((7, 4, 8, 5), run, 10)
    slots = torch.tensor([28, 29, 30, 31, 16, 17, 18, 19, 32, 33])
    for number, plane in enumerate(made.run_planes(run, 10)):
        order = (0, 2, 1, 3)[number]  # keys were numbered before values
        assert torch.equal(plane, (slots + order).view(10, 1, 1).expand_as(plane).to(torch.bfloat16))
    assert made.keys[0][12, 0, 0] == 12, "the page behind the run is as it was"
    for pages, tokens in (((7, 4), 10), ((7, 4, 8, 5), 13)):
        with pytest.raises(ValueError, match="do not both hold"):
            made.copy_tail(pages, run, tokens)


def test_tails_begin_as_a_copy_of_another() -> None:
    made = PagedKVPool(LAYOUT, pages=12, chunk_pages=4, page_size=4)
    for number, tensor in enumerate((*made.keys, *made.values)):
        tensor.copy_((torch.arange(52) + number).view(52, 1, 1).expand_as(tensor))
    before = [tensor.clone() for tensor in (*made.keys, *made.values)]
    made.share_tail((7, 4), [(9, 5, 11), (6, 8)], 6)
    for tensor, old in zip((*made.keys, *made.values), before, strict=True):
        for pages in ((9, 5), (6, 8)):
            for page, source in zip(pages, (7, 4), strict=True):
                assert torch.equal(tensor[4 * page : 4 * page + 4], old[4 * source : 4 * source + 4])
        others = [slot for slot in range(52) if slot // 4 not in (9, 5, 6, 8)]
        assert torch.equal(tensor[others], old[others])
    with pytest.raises(ValueError, match="do not all hold"):
        made.share_tail((7, 4), [(9, 5), (6,)], 6)


def test_the_scratch_page_is_nobodys() -> None:
    made = pool()
    assert made.allocate_run(16) is not None and made.allocate_pages(2) is not None
    assert made.scratch_page == 6 and len(made.keys[0]) == 7 * 4 and made.count()["free"] == 0
