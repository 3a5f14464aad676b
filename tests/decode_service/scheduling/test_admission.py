"""All pages or none, and who fills what: on a page table without memory."""

from __future__ import annotations

import pytest

from decode_service.scheduling.admission import Admission, Fill
from decode_service.scheduling.line import FillRoom, Misfit
from decode_service.scheduling.tails import Tails
from engine.kv.pages import PageTable
from engine.kv.resident import ResidentChunks
from engine.kv.source import KVSource
from serving.errors import Unsupported
from tests.decode_service.scheduling.scheduled import PAGE, request


class Pool:
    def __init__(self, *, chunk_pages: int = 8, tail_pages: int = 8) -> None:
        table = PageTable(pages=chunk_pages + tail_pages, chunk_pages=chunk_pages, page_size=PAGE)
        self.residents = ResidentChunks(table)  # type: ignore[arg-type]
        self.room = FillRoom(4, chunk_pages=chunk_pages, tail_pages=tail_pages)
        self.tails = Tails(table, PageTable(pages=0, chunk_pages=0, page_size=PAGE))
        self.admission = Admission(self.residents, self.room, self.tails)

    def count(self) -> tuple[int, int]:
        pages = self.residents.pool.count()
        return pages["chunk"], pages["tail"]


def test_what_can_never_fit_is_refused_with_the_field() -> None:
    pool = Pool()
    pool.admission.check_size(request("fits", [("a", 8 * PAGE), ("a", 8 * PAGE)]))
    with pytest.raises(Unsupported, match="their chunks need 16 pages of the KV pool; at most 8") as caught:
        pool.admission.check_size(request("twice", [("a", 8 * PAGE), ("a", 8 * PAGE)], bypass=True))
    assert caught.value.field == "segments"
    with pytest.raises(Unsupported, match="at most 8 hold tails") as caught:
        pool.admission.check_size(request("long", max_tokens=9 * PAGE))
    assert caught.value.field == "sampling.max_tokens"


def test_the_first_fills_and_the_others_wait_for_it() -> None:
    pool = Pool()
    one, two = request("one", [("a", 4), ("a", 4), ("b", 4)]), request("two", [("b", 4)])
    first, second = pool.admission.admit(one), pool.admission.admit(two)
    assert isinstance(first, Fill) and isinstance(second, Fill)
    assert [chunk.index for chunk in first.chunks] == [0, 2] and first.loading and not first.awaited
    assert not second.chunks and second.awaited == {"b"} and not second.loading
    assert (first.takes, second.takes) == (Misfit.LOAD, Misfit.ASK)
    assert pool.count() == (2, 0), "a tail has pages when it is begun"
    for chunk in list(first.chunks):
        pool.admission.filled(first, chunk)
    assert all(chunk.held.ready for chunk in (*one.composition.chunks, *two.composition.chunks))
    pool.admission.release(one)
    pool.admission.release(two)
    assert pool.count() == (2, 0) and pool.residents.held == 0


def test_nothing_is_held_or_evicted_by_who_does_not_fit() -> None:
    pool = Pool()
    holder = request("holder", [("held", 4 * PAGE)])
    assert isinstance(pool.admission.admit(holder), Fill)
    old = pool.residents.reserve(request("r", [("old", 4)]).composition.chunks[0].key, 4)
    old.ready = True
    pool.residents.release(old)
    before = pool.count()
    assert pool.admission.admit(request("large", [("x", 5 * PAGE)], bypass=True)) is Misfit.PAGES
    assert pool.admission.admit(request("long", tail=9 * PAGE)) is Misfit.PAGES
    assert pool.count() == before and pool.admission.take_evicted() == ()


def test_a_room_that_is_kept_is_not_entered() -> None:
    pool = Pool()
    assert pool.admission.admit(request("one", [("a", 4)]), {Misfit.LOAD}) is Misfit.LOAD
    assert pool.count() == (0, 0)


def test_what_was_not_filled_leaves_with_its_last_holder() -> None:
    pool = Pool()
    one, two = request("one", [("a", 4)]), request("two", [("a", 4)])
    fill = pool.admission.admit(one)
    assert isinstance(fill, Fill) and isinstance(pool.admission.admit(two), Fill)
    assert pool.admission.fill_failed(fill) == {"a"}
    pool.admission.release(one)
    assert pool.count()[0] == 1
    pool.admission.release(two)
    assert pool.count() == (0, 0)


def test_a_bypass_has_copies_of_its_own_and_computes_them() -> None:
    pool = Pool()
    one = request("one", [("a", 4), ("a", 4)], bypass=True)
    fill = pool.admission.admit(one)
    assert isinstance(fill, Fill) and fill.takes is None and not fill.chunks
    assert [(c.computed, c.outcome and c.outcome.source) for c in one.composition.chunks] == [
        *[(0, KVSource.COMPUTED)] * 2
    ]
    assert pool.count()[0] == 2
    pool.admission.release(one)
    assert pool.count() == (0, 0)
