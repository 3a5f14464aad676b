"""Rows of a step: what still has to be computed, cut into pieces under one budget."""

from __future__ import annotations

from decode_service.step_plan import Rows, StepPlan, next_pieces
from tests.decode_service.scheduled import Forwards, request


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


def test_rows_know_what_comes_of_them_and_one_plan_can_hold_both_kinds() -> None:
    one = request("one", tail=4)
    piece, last, token = Rows(one, 0, 2), Rows(one, 2, 2), Rows(one, 4, 1)
    assert [(rows.decodes, rows.last_of_prompt) for rows in (piece, last, token)] == [
        *((False, False), (False, True), (True, False))
    ]
    mixed = StepPlan((), (), (), (piece, token, last))
    assert (mixed.pieces, mixed.decodes, mixed.loads) == ([piece, last], [token], [])
