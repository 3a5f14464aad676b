"""What rows of a step are: pieces of prompts, the last of one, tokens of answers."""

from __future__ import annotations

from decode_service.step_plan import Rows, StepPlan
from tests.decode_service.scheduled import request


def test_rows_of_chunks_of_prompts_and_of_answers_are_told_apart() -> None:
    sequence = request("a", [("doc", 8)], tail=5)
    chunk = Rows(sequence, 0, 8, sequence.composition.chunks[0])
    first, last = Rows(sequence, 0, 3), Rows(sequence, 3, 2)
    answer = [Rows(sequence, 5, 1), Rows(sequence, 6, 1)]
    assert [rows.last_of_prompt for rows in (chunk, first, last, *answer)] == [False, False, True, False, False]
    assert [rows.decodes for rows in (chunk, first, last, *answer)] == [False, False, False, True, True]
    plan = StepPlan((), (), (chunk, answer[0], last, answer[1]))
    assert plan.pieces == [chunk, last] and plan.decodes == answer and plan.loads == []


def test_the_last_piece_of_a_chunk_draws_no_token() -> None:
    sequence = request("a", [("doc", 5)], tail=5)
    assert not Rows(sequence, 0, 5, sequence.composition.chunks[0]).last_of_prompt
