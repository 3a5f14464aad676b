"""Plans cover every (row, chunk) pair exactly once, whatever the levels; pages and slots line up; windows cut them."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan import CascadePlan, PlacedChunk, StepSequence, Window, behind_each_other, plan_levels, plan_step

PAGE = 4
LIBRARY = [PlacedChunk(first_slot=100 * i, tokens=1 + 7 * i, offset=0, start=0) for i in range(5)]


@st.composite
def sequences(draw: st.DrawFn) -> list[StepSequence]:
    out = []
    for index in range(draw(st.integers(1, 8))):
        picks = draw(st.lists(st.sampled_from(LIBRARY), max_size=5))
        chunks = behind_each_other((c.first_slot, c.tokens, draw(st.integers(0, 50))) for c in picks)
        rows, before = draw(st.integers(1, 6)), draw(st.integers(0, 9))
        pages = tuple(range(1000 + 10 * index, 1000 + 10 * index + -(-(rows + before) // PAGE)))
        position = sum(c.tokens for c in chunks) + draw(st.integers(0, 3)) + before
        out.append(StepSequence(chunks, pages, before, rows, position))
    return out


@settings(max_examples=200, deadline=None)
@given(steps=sequences(), levels=st.integers(1, 5))
def test_every_pair_is_read_once_and_in_its_place(steps: list[StepSequence], levels: int) -> None:
    plan = plan_step(steps, plan_levels(steps, max_cascade_levels=levels), page_size=PAGE)
    wanted = []
    row = 0
    for step in steps:
        for _ in range(step.rows):
            wanted += [(row, part, c.first_slot, c.tokens, c.offset, c.start) for part, c in enumerate(step.chunks)]
            row += 1
    got = [
        (r, part, read.first_slot, read.tokens, offset, start)
        for read in plan.reads
        for r, offset, part, start in zip(read.rows, read.offsets, read.places, read.starts, strict=True)
    ]
    assert sorted(got) == sorted(wanted)
    assert len(plan.levels) <= max(levels - 1, 1)
    assert sum(read.tokens for read in plan.reads) <= sum(tokens for _, _, _, tokens, _, _ in wanted)
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


Seen = dict[tuple[int, int], set[int]]  # of (row, place; the tail is place -1): slots of chunks, tokens of tails


def seen_by(plan: CascadePlan) -> Seen:
    """What each row of a plan attends to; nothing twice, and no part of which it sees nothing."""
    seen: Seen = {}
    for read in plan.reads:
        assert read.rows and len(read.firsts or read.rows) == len(read.rows)
        firsts = read.firsts or (0,) * len(read.rows)
        for row, place, first in zip(read.rows, read.places, firsts, strict=True):
            assert (row, place) not in seen and 0 <= first < read.tokens
            seen[row, place] = set(range(read.first_slot + first, read.first_slot + read.tokens))
    for tail in plan.tails:
        for index, first in enumerate(tail.first or (0,) * tail.rows):
            assert 0 <= first <= tail.tokens_before + index
            seen[tail.first_row + index, -1] = set(range(first, tail.tokens_before + index + 1))
    return seen


def visible(steps: list[StepSequence], window: Window | None) -> Seen:
    """The same from positions alone, token by token."""
    seen: Seen = defaultdict(set)
    row = 0
    for step in steps:
        for index in range(step.rows):
            at = step.position + index

            def sees(other: int, at: int = at) -> bool:
                if window is None:
                    return other <= at
                if window.chunked:
                    return other <= at and other // window.tokens == at // window.tokens
                return at - window.tokens < other <= at

            for place, chunk in enumerate(step.chunks):
                own = {chunk.first_slot + i for i in range(chunk.tokens) if sees(chunk.start + i)}
                if own:
                    seen[row, place] = own
            start = step.position - step.tail_tokens
            seen[row, -1] = {i for i in range(step.tail_tokens + index + 1) if sees(start + i)}
            row += 1
    return dict(seen)


WINDOWS = st.one_of(st.none(), st.builds(Window, tokens=st.integers(1, 150), chunked=st.booleans()))


@settings(max_examples=300, deadline=None)
@given(steps=sequences(), levels=st.integers(1, 5), window=WINDOWS)
def test_a_window_leaves_what_its_rows_see(steps: list[StepSequence], levels: int, window: Window | None) -> None:
    plan = plan_step(steps, plan_levels(steps, max_cascade_levels=levels), page_size=PAGE)
    through = plan.seen_through(window)
    assert seen_by(through) == visible(steps, window)
    assert all(level for level in through.levels)
    whole = {
        (read.first_slot, row, place): read
        for read in plan.reads
        for row, place in zip(read.rows, read.places, strict=True)
    }
    for read in through.reads:
        for index, (row, place) in enumerate(zip(read.rows, read.places, strict=True)):
            old = whole[read.first_slot, row, place]
            at = list(zip(old.rows, old.places, strict=True)).index((row, place))
            assert (read.offsets[index], read.starts[index]) == (old.offsets[at], old.starts[at])
    assert (through.positions, through.slots, through.partials) == (plan.positions, plan.slots, plan.partials)
    assert through.tokens_read <= plan.tokens_read
    if window is None or not any(map(window.first, plan.positions)):
        assert through is plan


def test_levels_that_a_window_leaves_whole_are_the_same_object() -> None:
    chunks = behind_each_other([(0, 5, 0), (100, 90, 0)])
    step = StepSequence(chunks, tuple(range(1000, 1010)), 30, 1, 125)
    plan = plan_step([step], plan_levels([step], max_cascade_levels=3), page_size=PAGE)
    assert plan.seen_through(Window(126)) is plan
    assert plan.seen_through(Window(127, chunked=True)) is plan
    first = plan.seen_through(Window(120))
    assert [(read.first_slot, read.firsts) for read in first.reads] == [(100, (1,))]
    later = plan.seen_through(Window(20))
    assert not later.levels and later.tails[0].first == (11,) and later.tokens_read == 20


def test_a_window_that_hides_only_a_tail_s_beginning_keeps_the_levels() -> None:
    steps = [
        StepSequence((), tuple(range(10)), 30, 1, 30),
        StepSequence(behind_each_other([(100, 7, 0)]), (40,), 1, 1, 8),
    ]
    plan = plan_step(steps, plan_levels(steps, max_cascade_levels=3), page_size=PAGE)
    through = plan.seen_through(Window(9))
    assert through.levels is plan.levels and through.tails[0].first == (22,) and through.tails[1] is plan.tails[1]


def test_padding_rows_see_their_own_token_through_any_window() -> None:
    step = StepSequence(behind_each_other([(100, 40, 0)]), (3, 4), 5, 1, 45)
    plan = plan_step([step], plan_levels([step], max_cascade_levels=3), page_size=PAGE).padded(4, 50, PAGE)
    for window in (Window(1), Window(3, chunked=True)):
        assert all(seen_by(plan.seen_through(window))[row, -1] == {0} for row in (1, 2, 3))
