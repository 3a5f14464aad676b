"""Rows of a step: what still has to be computed, cut into pieces under one budget, or into slices as there is room."""

from __future__ import annotations

from decode_service.prompt.scores import PromptScores
from decode_service.scheduling.step_plan import Rows, StepPlan, next_pieces, next_slices
from engine.run.room import StepRoom
from tests.decode_service.scheduling.scheduled import Forwards, request


def test_chunks_that_are_computed_here_come_before_the_tail() -> None:
    one = request("one", [("a", 5), ("stored", 9), ("b", 3)], tail=4)
    a, _, b = one.composition.chunks
    a.computed, b.computed = 2, 0
    assert next_pieces([one], Forwards()) == [
        *(Rows(one, 2, 3, a, alone=True), Rows(one, 0, 3, b, alone=True), Rows(one, 0, 4, alone=True))
    ]


def test_pieces_share_a_budget_and_the_first_always_comes() -> None:
    long, short = request("long", tail=20), request("short", tail=2)
    assert next_pieces([long, short], Forwards(piece_tokens=8)) == [Rows(long, 0, 8, alone=True)]
    long.tail_tokens = 16
    assert next_pieces([long, short], Forwards(piece_tokens=8)) == [
        Rows(long, 16, 4, alone=True),
        Rows(short, 0, 2, alone=True),
    ]
    assert next_pieces([], Forwards()) == []


def test_a_turn_has_few_forwards_however_short_they_are() -> None:
    """One of few rows takes about as long as a decode step: who decodes meanwhile waits for eight at most."""
    many = [request(f"{n}", tail=1) for n in range(30)]
    assert [len(next_pieces(many, Forwards(piece_tokens=size))) for size in (8, 64, 512)] == [8, 8, 8]


def test_slices_come_in_order_as_far_as_there_is_room() -> None:
    one = request("one", [("a", 5), ("b", 3)], tail=4)
    two, three = request("two", tail=6), request("three", tail=2)
    one.composition.chunks[0].computed = 2
    first = one.composition.chunks[0]
    packing = Forwards(packs=True)
    assert next_slices([one, two, three], packing, StepRoom(20)) == [
        Rows(one, 2, 3, first),
        Rows(two, 0, 6),
        Rows(three, 0, 2),
    ]
    assert next_slices([one, two, three], packing, StepRoom(7)) == [Rows(one, 2, 3, first), Rows(two, 0, 4)]
    assert next_slices([one, two, three], packing, StepRoom(0)) == []
    long = Forwards(packs=True, long=4)
    assert next_slices([one, two], long, StepRoom(7)) == [Rows(two, 0, 6)], "what is alone lets the others pass"
    assert next_pieces([one, two], long) == [Rows(one, 2, 3, first, alone=True)]
    first.computed = 5
    assert next_pieces([one, two], long) == [] and next_slices([one], long, StepRoom(7)) == [Rows(one, 0, 4)]


def test_rows_that_are_scored_take_the_places_of_draws_that_nobody_has() -> None:
    one, two, three = (request(name, tail=30) for name in ("one", "two", "three"))
    for each in (one, two):
        each.scores = PromptScores(each.composition, 0)
    packing = Forwards(packs=True, slots=8)
    assert next_slices([one, two, three], packing, StepRoom(60), drawing=4) == [
        *(Rows(one, 0, 5), Rows(two, 0, 1), Rows(three, 0, 30))
    ]
    assert next_slices([one, two, three], packing, StepRoom(60), drawing=8) == [
        *(Rows(one, 0, 1), Rows(two, 0, 1), Rows(three, 0, 30))
    ], "each has the place of its own slot"
    assert next_slices([one, two, three], packing, StepRoom(3), drawing=4) == [Rows(one, 0, 3)]


def test_rows_know_what_comes_of_them_and_what_they_attend_to() -> None:
    one = request("one", [("a", 5), ("b", 3)], tail=4)
    piece, last, token = Rows(one, 0, 2, alone=True), Rows(one, 2, 2), Rows(one, 4, 1)
    assert [(rows.decodes, rows.last_of_prompt) for rows in (piece, last, token)] == [
        *((False, False), (False, True), (True, False))
    ]
    assert piece.context == [5, 3] and Rows(one, 0, 3, one.composition.chunks[1]).context == []
    mixed = StepPlan((), (), (), (), (token, last))
    assert (mixed.alone, mixed.packed, mixed.loads) == ([], [token, last], [])
    assert StepPlan((), (), (), (), (piece,)).alone == [piece]
