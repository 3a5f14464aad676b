"""Tail pages as answers grow: on page tables without memory."""

from __future__ import annotations

from decode_service.scheduling.sequence import Sequence
from decode_service.scheduling.tails import Tails
from engine.kv.pages import PageTable
from tests.decode_service.scheduling.scheduled import PAGE, request


class Pool:
    def __init__(self, pages: int = 8, aside: int = 4) -> None:
        self.table = PageTable(pages=pages, chunk_pages=0, page_size=PAGE)
        self.aside = PageTable(pages=aside, chunk_pages=aside, page_size=PAGE)
        self.tails = Tails(self.table, self.aside)

    def taken(self, name: str, tail: int = PAGE, max_tokens: int = 1) -> Sequence:
        made = request(name, tail=tail, max_tokens=max_tokens)
        assert self.tails.promise(made) and self.tails.take(made)
        made.tail_tokens = tail
        return made


def test_a_request_begins_with_pages_for_its_query_and_a_first_token() -> None:
    pool = Pool()
    assert [pool.tails.need(request("r", tail=tail, max_tokens=99)) for tail in (1, 3, 4, 5, 8)] == [1, 1, 2, 2, 3]
    assert pool.tails.need(request("one", tail=4, max_tokens=1)) == 1, "nothing follows its first token"
    assert pool.tails.need(request("chunks", [("a", 4)], tail=0)) == 0


def test_what_is_promised_is_not_promised_twice_but_may_be_grown_into() -> None:
    pool = Pool(pages=4)
    grows = pool.taken("grows", tail=PAGE - 1, max_tokens=99)
    waits = request("waits", tail=2 * PAGE, max_tokens=1)
    assert pool.tails.promise(waits)
    assert not pool.tails.promise(request("late", tail=1, max_tokens=1))
    assert pool.tails.promise(request("chunks", [("a", 4)], tail=0)), "who needs none is promised none"
    assert pool.tails.grow(grows, PAGE + 1) and pool.tails.grow(grows, 2 * PAGE + 1)
    assert not pool.tails.take(waits), "two pages are no longer there"
    pool.tails.release(grows)
    assert pool.tails.take(waits) and len(waits.tail_pages) == 2
    pool.table.check_integrity()


def test_who_runs_is_left_a_page_to_grow_into_each_as_far_as_it_may_grow() -> None:
    pool = Pool(pages=6)
    pool.taken("grows", tail=1, max_tokens=99)
    pool.taken("grows too", tail=1, max_tokens=99)
    pool.taken("is as long as it gets", tail=2, max_tokens=2)
    assert not pool.tails.promise(request("two", tail=2 * PAGE, max_tokens=1))
    assert pool.tails.promise(request("one", tail=PAGE, max_tokens=1))


def test_bytes_go_aside_and_come_back_in_the_order_in_which_pages_change_hands() -> None:
    pool = Pool(pages=4, aside=2)
    one, two = pool.taken("one", tail=2 * PAGE, max_tokens=1), pool.taken("two", tail=2 * PAGE, max_tokens=1)
    pages = one.tail_pages
    assert pool.tails.put_aside(one) and not one.tail_pages and one.aside is not None
    run = one.aside
    assert not pool.tails.put_aside(two), "there is no room for both"
    assert pool.tails.promise(one) and pool.tails.take(one) and one.aside is None
    moves = pool.tails.take_moves()
    assert [(move.sequence, move.run, move.back) for move in moves] == [(one, run, False), (one, run, True)]
    assert moves[0].pages == pages and moves[1].pages == one.tail_pages and pool.tails.take_moves() == ()
    assert pool.tails.put_aside(one), "its room was free again"
    pool.tails.forget(one)
    pool.aside.check_integrity()
    assert not pool.aside.runs


def test_nothing_is_put_aside_of_who_has_nothing_yet_or_bypasses_the_caches() -> None:
    pool = Pool()
    fresh, bypass = pool.taken("fresh"), pool.taken("bypass")
    fresh.tail_tokens, bypass.bypass = 0, True
    assert not pool.tails.put_aside(fresh) and not pool.tails.put_aside(bypass)
    assert pool.table.free_tail_pages == 8 and pool.tails.take_moves() == ()
