"""Plans of decode steps: buckets, and levels that are kept while compositions stay."""

from __future__ import annotations

from unittest import mock

import pytest

from chunk_store.layout import KVLayout, LayerLayout
from engine.kv.pool import PagedKVPool
from engine.plan import PlacedChunk, StepSequence, plan_levels
from engine.run import planning
from engine.run.planning import DecodePlanner, plan_piece

POOL = PagedKVPool(KVLayout("float32", (LayerLayout(1, 2, 2),)), pages=9, chunk_pages=5, page_size=4)


def sequence(at: int, page: int, chunks: tuple[PlacedChunk, ...] = ()) -> StepSequence:
    return StepSequence(chunks, (page,), at, 1, 7 + at)


def test_plans_are_padded_to_the_next_bucket_on_the_scratch_page() -> None:
    planner = DecodePlanner(POOL, (8, 2), 3)
    assert planner.buckets == (2, 8)
    for rows, padded in ((1, 2), (2, 2), (3, 8)):
        plan = planner.plan([1] * rows, [sequence(0, 5)] * rows)
        assert (len(plan.slots), len(planner.padded(plan).slots)) == (rows, padded)
        assert set(planner.padded(plan).slots[rows:]) <= {POOL.scratch_page * 4}


def test_levels_are_planned_anew_when_a_composition_changes_alone() -> None:
    chunk, moved = PlacedChunk(0, 4, 0), PlacedChunk(4, 4, 0)
    planner = DecodePlanner(POOL, (4,), 3)
    with mock.patch.object(planning, "plan_levels", wraps=plan_levels) as planned:
        for at in range(3):
            planner.plan([1, 1], [sequence(at, 5, (chunk,)), sequence(at, 6, (chunk,))])
        assert planned.call_count == 1
        plan = planner.plan([1, 1], [sequence(3, 5, (moved,)), sequence(3, 6, (moved,))])
        assert planned.call_count == 2
    assert plan.reads[0].first_slot == 4 and plan.reads[0].rows == (0, 1)


def test_a_piece_stands_alone() -> None:
    chunks = (PlacedChunk(0, 4, 0), PlacedChunk(4, 3, 2))
    plan = plan_piece([1, 2, 3], StepSequence(chunks, (6,), 1, 3, 20), 4, 8)
    assert (plan.positions, plan.slots, plan.partials) == ((20, 21, 22), (25, 26, 27), 3)
    assert [read.rows for read in plan.reads] == [(0, 1, 2)] * 2
    with pytest.raises(ValueError, match="2 tokens for 3 rows"):
        plan_piece([1, 2], StepSequence(chunks, (6,), 1, 3, 20), 4, 8)
