"""Who goes next: the rules alone, on requests that are nothing but a name."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from decode_service.scheduling.line import MISFITS_MAX, PASSES_MAX, STEPS_A_PIECE, FillRoom, Line, Misfit, Stay, Turns


@dataclass
class Entered:
    name: str
    takes: Misfit | None


def request(name: str, at: int = 0) -> Any:
    """Behind an ``@`` stands whose it is."""
    clock = SimpleNamespace(submitted=at)
    return SimpleNamespace(
        name=name, passed=0, cold=name[0] == "c", clock=clock, tenant=name.partition("@")[2], priority=0
    )


def line_of(*names: str) -> Line:
    line = Line()
    for at, name in enumerate(names):
        line.add(request(name, at))
    return line


def admit(sequence: Any, kept: set[Misfit]) -> Entered | Misfit:
    """Names begin with what the request is: large, cold (there is no room to ask), asking, reading, or warm."""
    kind = sequence.name[0]
    room = {"c": Misfit.ASK, "a": Misfit.ASK, "r": Misfit.LOAD}.get(kind)
    if kind == "l":
        return Misfit.PAGES
    if kind == "c" or room in kept:
        return room
    return Entered(sequence.name, room)


def names(line: Any) -> list[str]:
    return [request.name for request in line]


def taken(line: Line) -> list[str]:
    found = []
    while (entered := line.next(admit)) is not None:
        found.append(entered.name)
    return found


def test_a_large_request_is_passed_a_bounded_number_of_times() -> None:
    line = line_of("large", *(f"w{n}" for n in range(PASSES_MAX + 5)))
    assert taken(line) == [f"w{n}" for n in range(PASSES_MAX)]
    assert names(line) == ["large", *(f"w{n}" for n in range(PASSES_MAX, PASSES_MAX + 5))]


def test_cold_requests_are_passed_for_ever_but_by_those_who_want_the_same() -> None:
    others = [f"{kind}{n}" for n in range(2 * PASSES_MAX) for kind in "wr"]
    line = line_of("cold", *others)
    assert line.asks and taken(line) == others
    asking = [f"a{n}" for n in range(PASSES_MAX + 2)]
    assert taken(line_of("cold", *asking, "w")) == [*asking[:PASSES_MAX], "w"]


def test_tenants_take_turns() -> None:
    flood = [f"w{n}@a" for n in range(6)]
    assert taken(line_of(*flood, "w@b", "v@b", "w@c")) == [
        *("w0@a", "w@b", "w@c", "w1@a", "v@b", "w2@a", "w3@a", "w4@a", "w5@a")
    ]
    line = line_of("w0@a", "w@b")
    assert [line.next(admit).name for _ in range(2)] == ["w0@a", "w@b"]
    for at, name in enumerate(("x@b", "w1@a")):
        line.add(request(name, at))
    assert taken(line) == ["w1@a", "x@b"], "who was served longer ago goes first, whoever came first"


def test_who_may_not_run_holds_up_nobody() -> None:
    line = Line(lambda sequence: sequence.tenant != "a")
    for at, name in enumerate(("c0@a", "l@a", "w1@a", "w@b")):
        line.add(request(name, at))
    assert not line.asks and taken(line) == ["w@b"]
    assert all(sequence.passed == 0 for sequence in line)


def test_only_so_many_large_requests_are_tried() -> None:
    large = [f"l{n}" for n in range(MISFITS_MAX)]
    assert taken(line_of(*large[:-1], "w")) == ["w"]
    assert taken(line_of(*large, "w")) == []


def test_who_comes_back_stands_where_it_stood() -> None:
    line = line_of("w0", "w1", "w2")
    entered = next(iter(line))
    line.remove(entered)
    line.put_back(entered)
    assert names(line) == ["w0", "w1", "w2"]


def test_what_waits_for_computing_leaves_room_for_what_is_read() -> None:
    room = FillRoom(4, chunk_pages=80, tail_pages=80)
    asks = [Stay(10, 1, long=True) for _ in range(5)]
    assert [room.enter(stay) for stay in asks] == [True] * 4 + [False]
    loads = [Stay(5, 1) for _ in range(5)]
    assert [room.enter(stay) for stay in loads] == [True] * 4 + [False]
    assert not room.may_ask(loads[0], others_wait=False) and room.may_ask(asks[0], others_wait=False)
    asks[0].loading = True
    room.stop_waiting(asks[0])
    assert not room.may_ask(loads[0], others_wait=False)  # it is still being loaded for
    room.stop_loading(asks[0])
    assert not room.may_ask(loads[0], others_wait=True)  # others were before it
    assert room.may_ask(loads[0], others_wait=False) and loads[0].long


def test_pages_of_those_who_wait_are_bounded_but_for_one_alone() -> None:
    room = FillRoom(4, chunk_pages=80, tail_pages=80)
    huge = Stay(70, 70, long=True)
    assert room.enter(huge) and not room.enter(Stay(1, 1, long=True))
    room.stop_waiting(huge)
    assert room.enter(Stay(40, 1, long=True)) and not room.enter(Stay(1, 1, long=True))


def test_decode_steps_between_two_pieces() -> None:
    turns = Turns(64)
    assert turns.may_prefill(decoding=True)
    turns.prefilled(64)
    waits = []
    for _ in range(STEPS_A_PIECE + 1):
        waits.append(turns.may_prefill(decoding=True))
        assert turns.may_prefill(decoding=False)
        turns.stepped()
    assert waits == [False] * STEPS_A_PIECE + [True]
    turns.prefilled(8)  # a short query costs about a step
    turns.stepped()
    assert turns.may_prefill(decoding=True)
