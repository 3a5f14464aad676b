"""Rows of requests as a runner takes them, and whose the tokens are that come back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from decode_service.device.begun import Begun, begin
from decode_service.scheduling.sequence import Sequence, State
from decode_service.scheduling.step_plan import Rows
from engine.kv.pages import PageRun
from engine.kv.resident import ResidentChunk
from engine.plan import PlacedChunk, StepSequence
from engine.run.protocol import StepRows
from engine.sampling.params import Choice, Draw
from tests.decode_service.scheduling.scheduled import request

RESIDENTS: Any = SimpleNamespace(pool=SimpleNamespace(page_size=4), moves=0)


class Runner:
    def __init__(self) -> None:
        self.batch: list[StepRows] = []

    def begin(self, batch: list[StepRows]) -> Any:
        self.batch = batch
        draws = sum(rows.draw is not None for rows in batch)
        return SimpleNamespace(plan=None, wait=lambda: [Choice(70 + at, None) for at in range(draws)])


def sequence(name: str, slot: int, **options: Any) -> Sequence:
    made = request(name, [("doc", 5)], **options)
    made.composition.chunks[0].resident = ResidentChunk(made.composition.chunks[0].key, 5, PageRun(2, 2))
    made.slot, made.tail_pages, made.state = slot, (9, 8), State.PREFILLING
    return made


def begun(*rows: Rows) -> tuple[Begun, list[StepRows]]:
    runner: Any = Runner()
    return begin(runner, rows, RESIDENTS), runner.batch


def test_a_row_that_decodes_takes_the_token_that_was_drawn_in_its_slot() -> None:
    one = sequence("one", 3)
    step, (row,) = begun(Rows(one, 4, 1))
    assert row == StepRows(StepSequence((PlacedChunk(8, 5, 0, 0),), (9, 8), 4, 1, 9), (~3,), Draw(3, 2, 10))
    assert step.decodes and step.tokens_flat == 10


def test_only_the_last_slice_of_a_prompt_draws() -> None:
    one = sequence("one", 1, tail=6)
    _, slices = begun(Rows(one, 0, 4), Rows(one, 4, 2))
    assert [(rows.sources, rows.sequence.position, rows.draw) for rows in slices] == [
        *(((6,) * 4, 5, None), ((6,) * 2, 9, Draw(1, 0, 11)))
    ]


def test_a_slice_of_a_chunk_goes_to_the_chunks_own_pages() -> None:
    one = sequence("one", 0)
    _, (rows,) = begun(Rows(one, 2, 3, one.composition.chunks[0], alone=True))
    assert rows == StepRows(StepSequence((), (2, 3), 2, 3, 2), (5,) * 3, None, alone=True)


def test_tokens_are_of_those_who_have_not_ended() -> None:
    one, two, three = (sequence(name, slot) for slot, name in enumerate("abc"))
    step, _ = begun(Rows(one, 3, 1), Rows(two, 3, 1), Rows(three, 0, 2))
    one.state = State.ENDED
    assert [(rows.sequence, choice.token_id) for rows, choice in step.wait()] == [(two, 71)]
    prompt, _ = begun(Rows(three, 0, 3))
    assert [choice.token_id for _, choice in prompt.wait()] == [70] and not prompt.decodes
