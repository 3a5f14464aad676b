"""Plans of steps: buckets, levels that are kept while compositions and numbers of rows stay, what is refused."""

from __future__ import annotations

from unittest import mock

import pytest

from chunk_store.layout import KVLayout, LayerLayout
from engine.kv.pool import PagedKVPool
from engine.plan import PlacedChunk, StepSequence, plan_levels
from engine.run import planning
from engine.run.planning import StepPlanner, check_batch, padded_to
from engine.run.protocol import StepRows

POOL = PagedKVPool(KVLayout("float32", (LayerLayout(1, 2, 2),)), pages=9, chunk_pages=5, page_size=4)


def step_rows(at: int, page: int, chunks: tuple[PlacedChunk, ...] = (), rows: int = 1, alone: bool = False) -> StepRows:
    return StepRows(StepSequence(chunks, (page,), at, rows, 7 + at), [1] * rows, alone=alone)


def test_plans_are_padded_to_the_next_bucket_on_the_scratch_page() -> None:
    planner = StepPlanner(POOL, 3)
    for rows, padded in ((1, 2), (2, 2), (3, 8)):
        plan = planner.plan([step_rows(0, 5)] * rows, piece_tokens=8)
        more = padded_to(plan, (2, 8), POOL)
        assert (len(plan.slots), len(more.slots)) == (rows, padded)
        assert set(more.slots[rows:]) <= {POOL.scratch_page * 4}


def test_levels_are_planned_anew_when_a_composition_or_a_number_of_rows_changes() -> None:
    chunk, moved = PlacedChunk(0, 4, 0, 0), PlacedChunk(4, 4, 0, 0)
    planner = StepPlanner(POOL, 3)
    with mock.patch.object(planning, "plan_levels", wraps=plan_levels) as planned:
        for at in range(3):
            planner.plan([step_rows(at, 5, (chunk,)), step_rows(at, 6, (chunk,))], piece_tokens=8)
        assert planned.call_count == 1
        plan = planner.plan([step_rows(3, 5, (moved,)), step_rows(3, 6, (moved,))], piece_tokens=8)
        assert planned.call_count == 2
        mixed = planner.plan([step_rows(3, 5, (moved,)), step_rows(1, 6, (moved,), rows=3)], piece_tokens=8)
        assert planned.call_count == 3
    assert plan.reads[0].first_slot == 4 and tuple(plan.reads[0].rows) == (0, 1)
    assert tuple(mixed.reads[0].rows) == (0, 1, 2, 3) and tuple(mixed.positions) == (10, 8, 9, 10)


def test_a_piece_stands_alone() -> None:
    chunks = (PlacedChunk(0, 4, 0, 0), PlacedChunk(4, 3, 2, 4))
    piece = StepRows(StepSequence(chunks, (6,), 1, 3, 20), [1, 2, 3], alone=True)
    plan = StepPlanner(POOL, 3).plan([piece], piece_tokens=8)
    assert (tuple(plan.positions), tuple(plan.slots), plan.partials) == ((20, 21, 22), (25, 26, 27), 3)
    assert [tuple(read.rows) for read in plan.reads] == [(0, 1, 2)] * 2


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ([], "needs rows"),
        ([StepRows(StepSequence((), (6,), 1, 3, 20), [1, 2])], "2 sources for 3 rows"),
        ([StepRows(StepSequence((), (6,), 1, 0, 20), [])], "0 sources for 0 rows"),
        ([step_rows(0, 5, alone=True), step_rows(0, 6)], "alone, not in a step of 2"),
        ([step_rows(0, 5, rows=3, alone=True)], "a piece of 3 rows, 2 are the most"),
    ],
)
def test_what_no_runner_begins(batch: list[StepRows], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_batch(batch, 2)
