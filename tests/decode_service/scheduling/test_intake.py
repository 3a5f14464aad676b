"""Who is admitted, who begins and who waits: the scheduler's intake, on a fake runner."""

from __future__ import annotations

from decode_service.scheduling.giving_way import GaveWay
from decode_service.scheduling.line import PASSES_MAX
from decode_service.scheduling.sequence import AllReady, FinishReason
from engine.sampling.params import Choice
from serving.tenancy.quotas import Quotas
from tests.decode_service.scheduling.scheduled import PAGE, Scheduled, request


def test_who_does_not_fit_is_passed_so_often_and_no_more() -> None:
    on = Scheduled(tail_pages=10)
    holder = request("holder", max_tokens=15, tail=PAGE)
    large = request("large", max_tokens=1, tail=8 * PAGE)
    small = [request(f"{n}", max_tokens=1) for n in range(PASSES_MAX + 3)]
    on.submit(holder, large, *small)
    while not large.clock.admitted:
        on.step()
        on.check()
    assert large.passed == PASSES_MAX and holder.done
    on.finish()
    before = [sequence.clock.admitted < large.clock.admitted for sequence in small]
    assert before == [True] * PASSES_MAX + [False] * 3, "those behind the bound waited for it"
    on.check_idle()


def test_all_pages_or_none() -> None:
    on = Scheduled(chunk_pages=6)
    on.resident("old", 8)
    first = request("first", [("a", 12)])
    both = request("both", [("b", 8), ("c", 8)])
    on.submit(first, both)
    plan = on.plan()
    assert [fill.sequence for fill in plan.admitted] == [first] and on.states() == "lw"
    assert not both.tail_pages and all(chunk.resident is None for chunk in both.composition.chunks)
    on.check()
    on.finish()
    on.check_idle()


def test_a_request_as_large_as_the_pool_gets_in_whatever_lies_there_unheld() -> None:
    on = Scheduled(chunk_pages=14)
    on.resident("old", 3)
    on.submit(request("one", [("a", 40), ("b", 16)]))
    assert len(on.plan().admitted) == 1, "its second chunk has no run of pages before the old one goes"
    on.finish()


def test_what_is_evicted_stands_in_the_plan() -> None:
    on = Scheduled(chunk_pages=4)
    on.resident("old", 8)
    on.resident("new", 8)
    on.submit(request("one", [("a", 8)]))
    assert on.plan().evicted == ("old",)
    on.finish()


def test_tenants_take_turns_and_may_run_no_more_than_their_quota() -> None:
    on = Scheduled(batch_max=8, quotas=Quotas(running=2, waiting=9))
    many = [request(f"m{n}", tenant="many") for n in range(5)]
    few = [request(f"f{n}", tenant="few") for n in range(2)]
    on.submit(*many, *few)
    admitted = [fill.sequence.request_id for fill in on.plan().admitted]
    assert admitted == ["m0", "f0", "m1", "f1"]
    on.finish()
    on.check_idle()


def test_whose_kv_is_there_waits_for_a_place_to_decode_and_keeps_it_from_those_behind() -> None:
    on = Scheduled(batch_max=2)
    on.submit(*(request(f"{n}", [(f"doc{n}", 4)], max_tokens=9) for n in range(2)))
    on.plan()
    on.submit(request("warm", max_tokens=2), request("too", max_tokens=2))
    on.step()
    assert on.states() == "lldd", "who waits for KV takes no place to decode"
    for fill in list(on.loads):
        on.load(fill)
    on.submit(request("late"))
    on.plan()
    assert on.states() == "llddw"
    on.finish()
    assert on.sequences[0].clock.filled <= on.sequences[1].clock.filled < on.sequences[4].clock.admitted
    on.check_idle()


def test_a_request_for_chunks_ends_when_they_are_there_and_takes_no_place_to_decode() -> None:
    on = Scheduled(batch_max=1)
    on.submit(request("decoding", max_tokens=60))
    on.step()
    one = request("one", [("doc", 20), ("b", 4)], tail=0, exact=True)
    on.submit(one)
    on.step()
    assert on.states() == "dl" and on.scheduler.running == 1
    (fill,) = on.loads
    on.came(fill, one.composition.chunks[0], "claim")
    while not on.ready(one):
        assert on.step().rows
        on.check()
    assert on.ready(one) == [0] and on.claims[0].became == "published", "the first can be read before the second is"
    on.load(fill, ["claim"])
    on.step()
    on.step()
    while not one.done:
        on.step()
    assert on.events[one][-1] == AllReady() and [claim.became for claim in on.claims] == ["published"] * 2
    assert on.states() == "de"
    warm = request("warm", [("doc", 20), ("b", 4)], tail=0, exact=True)
    on.submit(warm)
    assert not on.plan().loads and warm.done and on.ready(warm) == [0, 1]
    on.finish()
    on.check_idle()


def test_tenants_that_ask_for_chunks_take_turns_with_those_that_ask_for_answers() -> None:
    on = Scheduled(batch_max=2, chunk_pages=48, quotas=Quotas(running=1, waiting=9))
    many = [request(f"m{n}", [(f"m{n}", 20)], tail=0, tenant="many") for n in range(4)]
    on.submit(*many, request("f0", [("f0", 4)], tenant="few"), request("f1", [("f1", 4)], tenant="few"))
    assert [fill.sequence.request_id for fill in on.plan().admitted] == ["m0", "f0"], "two may read"
    assert on.ask(on.loads[0])
    on.load(on.loads[1])
    on.load(on.loads[0], ["claim"])
    assert [fill.sequence.request_id for fill in on.plan().admitted] == ["m1", "m2"], "running=1 is for answers"
    on.finish()
    on.check_idle()


def test_who_waits_for_a_token_to_go_on_keeps_its_place_from_those_behind() -> None:
    on = Scheduled(batch_max=2)
    running, gave_way, behind = (request(name, max_tokens=9) for name in ("running", "gave way", "behind"))
    on.submit(running, gave_way)
    while on.states() != "dd":
        on.step()
    unread = on.plan()
    on.scheduler.ran(unread.rows)  # launched, its tokens not there yet
    on.scheduler._leaving.give_way(gave_way, GaveWay.GROWTH)
    on.submit(behind)
    on.plan()
    assert on.states() == "dlw", "there is a place to decode, and it is not for who came later"
    for rows in unread.rows:
        on.scheduler.token(rows.sequence, Choice(7, None), 99)
    on.plan()
    assert on.states() == "dpw"
    on.finish()
    assert [on.reason(each) for each in on.sequences] == [FinishReason.LENGTH] * 3
    on.check_idle()
