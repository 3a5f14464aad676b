"""Room in the queue: bounded, first come first served, and nothing lost by who gives up."""

from __future__ import annotations

import gc
import weakref

import pytest

from serving.errors import Unavailable
from serving.publishing.room import Room


def test_room_is_bounded_and_given_out_in_the_order_asked() -> None:
    room = Room(10)
    first = room.take(6)
    assert first is not None and room.take(5) is None
    large, small = room.ask(8), room.ask(2)
    assert not large.done() and not small.done(), "who comes later does not pass by"
    assert room.take(1) is None, "nor does who would not wait"
    first.give_back()
    first.give_back()
    assert large.done() and small.done() and room.taken == 10
    for given in (large, small):
        given.result().give_back()
    assert room.taken == 0


def test_what_is_larger_than_all_of_it_gets_in_alone() -> None:
    room = Room(10)
    other = room.take(1)
    assert other is not None
    large = room.ask(99)
    assert not large.done()
    other.give_back()
    assert large.done() and room.take(1) is None
    large.result().give_back()


def test_who_gives_up_makes_way_for_the_next() -> None:
    room = Room(10)
    held = room.take(5)
    large, small = room.ask(10), room.ask(5)
    assert large.cancel() and small.done()
    assert held is not None
    held.give_back()
    small.result().give_back()
    assert room.taken == 0


def test_who_gives_up_is_forgotten_while_the_line_stands() -> None:
    """A store that stalls keeps the head of the line where it is for hours; others come and go behind it."""
    room = Room(10)
    assert room.take(10) is not None
    head = room.ask(5)
    others = [room.ask(5) for _ in range(3)]
    gone = [weakref.ref(each) for each in others]
    for each in others:
        assert each.cancel()
    others.clear()
    del each
    gc.collect()
    assert not any(each() for each in gone) and not head.done() and room.waiting == 5


def test_closed_it_says_why_to_everybody() -> None:
    room = Room(10)
    held, waits = room.take(10), room.ask(1)
    room.close(Unavailable("the service is shutting down"))
    with pytest.raises(Unavailable):
        waits.result(0)
    with pytest.raises(Unavailable):
        room.ask(1)
    with pytest.raises(Unavailable):
        room.take(1)
    assert held is not None
    held.give_back()
    assert room.taken == 0
    with pytest.raises(ValueError, match="at least 1"):
        Room(0)
