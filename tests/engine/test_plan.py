"""Plans cover every (row, chunk) pair exactly once, whatever the levels; pages and slots line up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan import PlacedChunk, StepSequence, plan_levels, plan_step

PAGE = 4
LIBRARY = [PlacedChunk(first_slot=100 * i, tokens=1 + 7 * i, offset=0) for i in range(5)]


@st.composite
def sequences(draw: st.DrawFn) -> list[StepSequence]:
    out = []
    for index in range(draw(st.integers(1, 8))):
        picks = draw(st.lists(st.sampled_from(LIBRARY), max_size=5))
        chunks = tuple(PlacedChunk(c.first_slot, c.tokens, draw(st.integers(0, 50))) for c in picks)
        rows, before = draw(st.integers(1, 6)), draw(st.integers(0, 9))
        pages = tuple(range(1000 + 10 * index, 1000 + 10 * index + -(-(rows + before) // PAGE)))
        out.append(StepSequence(chunks, pages, before, rows, 77 + index))
    return out


@settings(max_examples=200, deadline=None)
@given(steps=sequences(), levels=st.integers(1, 5))
def test_every_pair_is_read_once_and_in_its_place(steps: list[StepSequence], levels: int) -> None:
    plan = plan_step(steps, plan_levels(steps, max_cascade_levels=levels), page_size=PAGE)
    wanted = []
    row = 0
    for step in steps:
        for _ in range(step.rows):
            wanted += [(row, part, c.first_slot, c.tokens, c.offset) for part, c in enumerate(step.chunks)]
            row += 1
    got = [
        (r, part, read.first_slot, read.tokens, offset)
        for read in plan.reads
        for r, offset, part in zip(read.rows, read.offsets, read.places, strict=True)
    ]
    assert sorted(got) == sorted(wanted)
    assert len(plan.levels) <= max(levels - 1, 1)
    assert sum(read.tokens for read in plan.reads) <= sum(tokens for _, _, _, tokens, _ in wanted)
    assert len(plan.slots) == len(plan.positions) == row


@settings(max_examples=50, deadline=None)
@given(steps=sequences())
def test_one_level_shares_nothing_and_many_levels_read_each_place_once(steps: list[StepSequence]) -> None:
    flat = plan_levels(steps, max_cascade_levels=1)
    owners = [index for index, step in enumerate(steps) for _ in range(step.rows)]
    assert all(len({owners[row] for row in read.rows}) == 1 for level in flat for read in level)
    deep = [read for level in plan_levels(steps, max_cascade_levels=50) for read in level]
    shared = [r for r in deep if len({owners[row] for row in r.rows}) > 1]
    assert len({(r.first_slot, r.tokens) for r in shared}) == len(shared)


def test_slots_follow_the_pages() -> None:
    step = StepSequence((), (9, 2), tail_tokens=3, rows=3, position=50)
    plan = plan_step([step], (), page_size=PAGE)
    assert plan.slots == (9 * PAGE + 3, 2 * PAGE, 2 * PAGE + 1)
    assert plan.positions == (50, 51, 52)
    with pytest.raises(ValueError, match="tail_pages"):
        plan_step([StepSequence((), (9,), 3, 3, 50)], (), page_size=PAGE)


def test_padding_rows_touch_the_scratch_page_only() -> None:
    step = StepSequence((LIBRARY[1],), (3,), 0, 1, 8)
    plan = plan_step([step], plan_levels([step], max_cascade_levels=3), page_size=PAGE).padded(4, 50, PAGE)
    assert plan.slots == (12, 200, 200, 200)
    assert all(read.rows == (0,) for read in plan.reads)
    assert plan.tokens_read == LIBRARY[1].tokens + 4
