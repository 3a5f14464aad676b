"""How long who waits has to expect to wait, by a clock of the test."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from chunk_store.tenant import Tenant
from serving.tenancy.places import PlacesFull, TenantPlaces
from serving.tenancy.quotas import TenantQuotas
from serving.tenancy.waits import Waits

A, B = Tenant("a"), Tenant("b")


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def steady(running: int, seconds: float, ends: int = 600) -> tuple[Waits, Clock]:
    """So many run, one beginning as one ends, each for so long."""
    clock = Clock()
    waits = Waits(running, clock)
    for number in range(running + ends):
        if number >= running:
            waits.ended()
        waits.began()
        clock.now += seconds / running
    return waits, clock


@pytest.mark.parametrize(("running", "seconds"), [(1, 2.0), (4, 3.0), (32, 8.0), (64, 1.0)])
def test_the_line_moves_as_fast_as_requests_end(running: int, seconds: float) -> None:
    waits, _ = steady(running, seconds)
    assert waits.run_s == pytest.approx(seconds, rel=0.35)
    for place in (1, running, 5 * running):
        assert waits.expected_s(place) == pytest.approx(place * seconds / running, rel=0.35)
    assert waits.too_many(5 * running, 2.5 * seconds) and not waits.too_many(5 * running, 7 * seconds)
    assert waits.too_many(running, 0.1 * seconds)
    assert not waits.too_many(running)  # as many as run may wait, however long these take
    assert waits.too_many(12 * running) == (seconds > 1.0)  # of a request a second 12 s are no more than is usual


def test_who_finds_a_free_place_does_not_wait() -> None:
    waits, _ = steady(8, 5.0)
    for _ in range(6):
        waits.ended()
    assert waits.expected_s(6) == 0.0 < waits.expected_s(7)
    assert not waits.too_many(6, 0.0) and waits.too_many(7, 0.0)


def test_of_those_who_began_together_none_ends_before_its_time() -> None:
    waits, clock = steady(8, 4.0)
    for _ in range(8):
        waits.ended()
    for _ in range(8):
        waits.began()
    assert waits.expected_s(1) == pytest.approx(4.0, rel=0.35)
    clock.now += 2.0
    assert waits.expected_s(1) == pytest.approx(2.0, rel=0.5)
    assert waits.too_many(1, 0.5)


def test_who_becomes_slow_is_noticed_before_anybody_ends() -> None:
    waits, clock = steady(4, 0.1)
    assert waits.expected_s(4) < 0.2
    clock.now += 60.0
    assert waits.expected_s(400) > 100.0


def test_nothing_is_expected_of_what_never_ran() -> None:
    clock = Clock()
    waits = Waits(1, clock)
    assert waits.expected_s(5) == 0.0 and not waits.too_many(1000, 0.0) and not waits.too_many(1000)
    waits.began()
    assert waits.expected_s(1000) == 0.0
    clock.now += 3.0
    assert waits.run_s == pytest.approx(6.0) and waits.expected_s(1) == pytest.approx(6.0)
    waits.put_back()
    assert waits.run_s == 0.0


def test_a_long_line_is_refused_by_time_and_only_to_those_who_made_it() -> None:
    clock = Clock()
    places = TenantPlaces(1000, TenantQuotas(), 10.0, Waits(2, clock))
    for _ in range(2):
        places.take(A)
        places.admit(A)
    clock.now = 4.0
    places.end(A)
    places.take(A)
    places.admit(A)
    clock.now = 5.0
    taken = 0
    with pytest.raises(PlacesFull, match="would not come within 10 s"):
        while taken < 1000:
            places.take(A)
            taken += 1
    assert 3 < taken < 20
    places.take(B)
    usual = TenantPlaces(50, TenantQuotas(), waits=Waits(2, clock))
    usual.take(A)
    usual.admit(A)
    clock.now = 1e6
    for _ in range(3):
        usual.take(A)
    for _ in range(9):
        with pytest.raises(PlacesFull, match="soon enough"):
            for _ in range(9):
                usual.take(A)
