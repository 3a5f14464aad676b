"""Whose pages go when they run out."""

from __future__ import annotations

import random

from decode_service.scheduling.giving_way import who_gives_way
from decode_service.scheduling.sequence import Sequence
from tests.decode_service.scheduling.scheduled import request


def running(name: str, at: int, pages: int = 1, *, tenant: str = "", priority: int = 0) -> Sequence:
    made = request(name, tenant=tenant, priority=priority)
    made.clock.submitted, made.tail_pages = at, tuple(range(pages))
    return made


def order(*there: Sequence) -> str:
    """Who gives way, one after the other."""
    left, gone = list(there), ""
    while left:
        last = who_gives_way(left)
        left.remove(last)
        gone += last.request_id
    return gone


def test_of_one_tenant_the_youngest_of_the_lowest_priority() -> None:
    a, b, c, d = (running(name, at, priority=p) for name, at, p in (("a", 1, 0), ("b", 2, 5), ("c", 3, 0), ("d", 4, 5)))
    assert order(a, b, c, d) == "cadb"


def test_a_priority_pushes_out_no_other_tenant() -> None:
    loud = [running(f"{n}", 10 + n, 4, tenant="loud", priority=9) for n in range(3)]
    quiet = running("q", 99, 1, tenant="quiet")
    assert order(*loud, quiet) == "21q0", "the younger of two that are first goes before the older"


def test_the_tenant_whose_others_have_most_pages_gives_way() -> None:
    many = [running(f"m{n}", n, 2, tenant="many") for n in range(4)]
    few = [running(f"f{n}", 10 + n, 5, tenant="few") for n in range(2)]
    assert order(*many, *few).startswith("m3f1")


def test_the_oldest_of_those_that_are_first_goes_last() -> None:
    for seed in range(50):
        draw = random.Random(seed)
        there = []
        for n in range(draw.randint(1, 9)):
            made = running(f"{n}", draw.randrange(10**6), draw.randint(1, 9), tenant=draw.choice("xyz"))
            made.priority = draw.choice((0, 9))
            there.append(made)
        firsts = [
            min((s for s in there if s.tenant == tenant), key=lambda s: (-s.priority, s.clock.submitted))
            for tenant in {s.tenant for s in there}
        ]
        last = order(*there)[-1]
        assert last == min(firsts, key=lambda s: s.clock.submitted).request_id
