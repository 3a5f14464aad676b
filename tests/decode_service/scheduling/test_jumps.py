"""What an answer's grammar forces goes into a step as rows of its own, as far as its room and the answer allow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from decode_service.device.begun import begin
from decode_service.scheduling.jumps import JUMP_MAX, forced_next, with_forced
from decode_service.scheduling.sequence import Sequence, State
from decode_service.scheduling.step_plan import Rows
from engine.run.room import StepRoom
from engine.sampling.params import Draw
from tests.decode_service.scheduling.scheduled import Forwards, request


def all_pages(sequence: Sequence, tokens: int) -> int:
    return tokens


PACKS, ALONE = Forwards(packs=True), Forwards(packs=False)


def decoding(forced: list[int], *, unread: int = 1, max_tokens: int = 100, **params: Any) -> Sequence:
    """Three tokens of a prompt, and of an answer one that is read and ``unread`` that are being drawn."""
    made = request("one", tail=3, max_tokens=max_tokens)
    made.sampling = SimpleNamespace(params=SimpleNamespace(**{  # type: ignore[assignment]
        "max_tokens": max_tokens, "logprobs": False, "penalises": False, **params,
    }))  # fmt: skip
    made.state, made.slot, made.tail_pages = State.DECODING, 2, (7, 9, 11)
    made.generated, made.tail_tokens = [5], 3 + unread
    made.grammar = SimpleNamespace(forced=lambda: forced)  # type: ignore[assignment]
    return made


def test_the_token_that_is_being_drawn_is_the_first_that_is_forced() -> None:
    assert forced_next(decoding([20, 21, 22])) == (21, 22)
    assert forced_next(decoding([20, 21, 22], unread=0)) == (20, 21, 22)
    assert forced_next(decoding([])) == ()


@pytest.mark.parametrize("params", [{"logprobs": True}, {"penalises": True}])
def test_what_each_draw_is_needed_for_is_drawn(params: dict[str, Any]) -> None:
    assert forced_next(decoding([20, 21, 22], **params)) == ()


def test_an_answer_is_not_longer_than_it_may_be() -> None:
    assert forced_next(decoding([20, 21, 22, 23], max_tokens=5)) == (
        21,
        22,
    )  # 5 is read, 20 drawn, the fifth drawn behind
    assert forced_next(decoding([20, 21, 22, 23], max_tokens=3)) == ()
    assert len(forced_next(decoding([20] * 200, max_tokens=500))) == JUMP_MAX


def test_rows_jump_as_far_as_there_is_room() -> None:
    sequence = decoding([20, 21, 22, 23])
    rows = [Rows(sequence, 4, 1)]
    assert with_forced(rows, PACKS, StepRoom(16), all_pages) == [Rows(sequence, 4, 4, forced=(21, 22, 23))]
    assert with_forced(rows, PACKS, StepRoom(16), lambda _, tokens: min(tokens, 6)) == [
        Rows(sequence, 4, 2, forced=(21,))
    ]
    assert with_forced(rows, PACKS, StepRoom(16), lambda *_: 4) == rows
    assert with_forced(rows, PACKS, StepRoom(2), all_pages) == [Rows(sequence, 4, 3, forced=(21, 22))]
    assert with_forced(rows, PACKS, StepRoom(0), all_pages) == rows
    assert with_forced(rows, ALONE, StepRoom(16), all_pages) == rows
    sequence.grammar = None
    assert with_forced(rows, PACKS, StepRoom(16), all_pages) == rows


def test_the_draw_is_behind_the_last_of_them() -> None:
    sequence = decoding([20, 21, 22])
    runner: Any = SimpleNamespace(begin=lambda batch: SimpleNamespace(plan=None, batch=batch))
    residents: Any = SimpleNamespace(pool=SimpleNamespace(page_size=4), moves=0)
    begun = begin(runner, [Rows(sequence, 4, 3, forced=(21, 22))], residents)
    (row,) = begun.step.batch  # type: ignore[attr-defined]
    assert (row.sources, row.sequence.rows, row.sequence.tail_tokens) == ((~2, 21, 22), 3, 4)
    assert row.draw == Draw(2, 4, 7)
