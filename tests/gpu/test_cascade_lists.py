"""The cascade kernels' work lists, without a device: every pair and token once, partials in order, limits."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from engine.plan import CascadePlan, StepSequence, plan_levels, plan_step
from engine.run.cuda.cascade.work import (
    AT_COUNTS,
    AT_ITEMS,
    AT_PAGES,
    AT_POSITIONS,
    CLASSES_MAX,
    HEADER,
    ITEM,
    PAIR,
    ROW,
    Ints,
    Limits,
    ListShape,
    SplitRule,
    WorkTooLarge,
    shared_lists,
    tail_lists,
)
from tests.gpu.cascade_cases import PAGE, random_sequences

RATIO = 4
LIMITS = Limits(rows=512, pairs=4096, items=8192, pages=8192, partials=16384)
SHAPE = ListShape(RATIO, ((64, 1), (128, 2)), ((64, 1),), ((64, 0),), SplitRule(), LIMITS)


def buffer_of(plan: CascadePlan) -> Ints:
    """The device buffer as ``CascadeWork`` fills it."""
    shared = shared_lists(plan.levels, len(plan.slots), SHAPE)
    buffer = np.full(LIMITS.static_ints + LIMITS.dynamic_ints, -(2**30), np.int32)
    buffer[: len(shared.blob)] = shared.blob
    tails = tail_lists(plan, shared, SHAPE, PAGE)
    buffer[LIMITS.static_ints : LIMITS.static_ints + len(tails)] = tails
    return buffer


def reads_of(buffer: Ints) -> tuple[Counter[tuple[int, int, int]], dict[int, list[int]]]:
    """(row, offset, slot) of every packed row's every token, counted; and the partials each row is given."""
    seen: Counter[tuple[int, int, int]] = Counter()
    partials: dict[int, list[int]] = {}
    pages_at = buffer[LIMITS.static_ints + AT_PAGES]
    for blob in (0, LIMITS.static_ints):
        for kind in range(CLASSES_MAX):
            first, count = buffer[blob + AT_ITEMS + kind], buffer[blob + AT_COUNTS + kind]
            for at in range(first, first + count * ITEM, ITEM):
                pairs_at, row0, rows_end, source, begin, full_end, end, split = buffer[at : at + ITEM].tolist()
                assert begin <= full_end <= end and begin < end
                height = {0: 64, 1: 64, 2: 128}[kind]
                for packed in range(row0, min(row0 + height, rows_end)):
                    row, offset, limit, partial = buffer[pairs_at + packed // RATIO * PAIR :][:PAIR].tolist()
                    if packed % RATIO == 0 and limit > begin:
                        partials.setdefault(row, []).append(partial + split)
                    for token in range(begin, min(end, limit)):
                        page = buffer[pages_at + ~source + token // PAGE] if source < 0 else 0
                        slot = page * PAGE + token % PAGE if source < 0 else source + token
                        seen[row, offset, int(slot)] += 1
    return seen, partials


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_packed_row_meets_every_token_once(seed: int) -> None:
    plan = random_sequences(seed, 12, rows=(1, 1, 3, 40), chunk_tokens=(1, 15, 16, 17, 300)).plan()
    seen, partials = reads_of(buffer_of(plan))
    expected: Counter[tuple[int, int, int]] = Counter()
    for read in plan.reads:
        for row, offset in zip(read.rows, read.offsets, strict=True):
            for slot in range(read.first_slot, read.first_slot + read.tokens):
                expected[row, offset, slot] += RATIO
    for tail in plan.tails:
        for i in range(tail.rows):
            for token in range(tail.tokens_before + i + 1):
                expected[tail.first_row + i, 0, tail.pages[token // PAGE] * PAGE + token % PAGE] += RATIO
    assert seen == expected
    given = [partial for parts in partials.values() for partial in parts]
    assert len(given) == len(set(given))


def test_row_records_name_the_partials_of_the_row() -> None:
    plan = random_sequences(3, 20, rows=(1, 5)).plan()
    buffer = buffer_of(plan)
    records = buffer[LIMITS.static_ints + HEADER :][: len(plan.slots) * ROW].reshape(-1, ROW).tolist()
    _, partials = reads_of(buffer)
    for row, (first, shared, tail_first, tails) in enumerate(records):
        assert sorted(partials[row]) == [*range(first, first + shared), *range(tail_first, tail_first + tails)]


def test_splits_depend_on_the_chunk_alone() -> None:
    rule = SplitRule()
    lengths = np.array([1, 2048, 2049, 16383, 16384, 65535, 65536], np.int32)
    assert rule.chunk_splits(lengths).tolist() == [1024, 1024, 2048, 2048, 4096, 4096, 8192]


def test_positions_are_the_plans() -> None:
    plan = random_sequences(4, 6).plan()
    buffer = buffer_of(plan)
    at = buffer[LIMITS.static_ints + AT_POSITIONS]
    assert tuple(buffer[at : at + len(plan.positions)].tolist()) == plan.positions


@pytest.mark.parametrize(
    "limits", [Limits(rows=3), Limits(pairs=2), Limits(items=4), Limits(pages=5), Limits(partials=6)]
)
def test_a_plan_beyond_the_limits_is_refused(limits: Limits) -> None:
    plan = random_sequences(5, 8).plan()
    shape = ListShape(RATIO, ((64, 1),), ((64, 1),), ((64, 0),), SplitRule(), limits)
    with pytest.raises(WorkTooLarge):
        tail_lists(plan, shared_lists(plan.levels, len(plan.slots), shape), shape, PAGE)


def test_tails_without_a_class_are_refused() -> None:
    with pytest.raises(ValueError, match="need a class each"):
        ListShape(RATIO, ((64, 1),), ((64, 1),), (), SplitRule(), LIMITS)


def test_a_long_tail_in_neighbouring_pages_is_read_as_a_run_and_in_splits_it_sees() -> None:
    pages = tuple(range(7, 7 + 140))
    scattered = (*pages[:50], 200, *pages[51:])
    for own, neighbours in ((pages, True), (scattered, False)):
        sequence = StepSequence((), own, 1000, 100, 1000)
        plan = plan_step([sequence], plan_levels([sequence], max_cascade_levels=3), page_size=PAGE)
        buffer = buffer_of(plan)
        blob = LIMITS.static_ints
        first, count = buffer[blob + AT_ITEMS], buffer[blob + AT_COUNTS]
        items = buffer[first : first + count * ITEM].reshape(-1, ITEM)
        # 100 rows in tiles of 16: all see the first split of 1024 tokens, those from row 24 on the second one.
        assert sorted(zip(items[:, 1].tolist(), items[:, 4].tolist(), strict=True)) == sorted(
            [(tile * 64, 0) for tile in range(7)] + [(tile * 64, 1024) for tile in range(1, 7)]
        )
        assert all((item[3] == 7 * PAGE) == neighbours for item in items)
        # A row has as many partial results as it has splits, so none that nobody writes.
        records = buffer[blob + HEADER :][: 100 * ROW].reshape(-1, ROW)
        assert records[:, 3].tolist() == [1] * 24 + [2] * 76
        _, partials = reads_of(buffer)
        for row, (_, _, first, count) in enumerate(records.tolist()):
            assert sorted(partials[row]) == [*range(first, first + count)]
