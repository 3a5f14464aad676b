"""The cascade kernels' work lists, without a device: every pair and token once, partials in order, limits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from engine.plan import CascadePlan, StepSequence, Window, plan_levels, plan_step
from engine.run.cuda.cascade.reads import Ints, PairReads, first_seen
from engine.run.cuda.cascade.records import (
    AT_COUNTS,
    AT_ITEMS,
    AT_PAGES,
    AT_POSITIONS,
    CLASSES_MAX,
    HEADER,
    ITEM,
    PAIR,
    ROW,
    Limits,
    ListShape,
    SplitRule,
    WorkTooLarge,
)
from engine.run.cuda.cascade.shared import shared_lists
from engine.run.cuda.cascade.tails import tail_lists
from tests.gpu.cascade_cases import PAGE, random_sequences

RATIO = 4
LIMITS = Limits(rows=512, pairs=4096, items=8192, pages=8192, partials=16384)
SHAPE = ListShape(RATIO, ((64, 1), (128, 2)), ((64, 1),), ((64, 0),), SplitRule(), LIMITS)


def buffer_of(plan: CascadePlan, window: Window | None = None, limits: Limits = LIMITS) -> Ints:
    """The device buffer as ``CascadeWork`` fills it, with the dynamic part where ``LIMITS`` have it."""
    shape = replace(SHAPE, limits=limits)
    reads, seen = PairReads.of(plan.levels), first_seen(window, np.array(plan.positions, np.int32))
    reads = reads if seen is None else reads.without(reads.hidden(seen))
    shared = shared_lists(reads, len(plan.slots), shape)
    buffer = np.full(LIMITS.static_ints + LIMITS.dynamic_ints, -(2**30), np.int32)
    buffer[: len(shared.blob)] = shared.blob
    tails = tail_lists(plan, shared, shape, PAGE, seen)
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
                pairs_at, row0, rows_end, source, begin, full_end, end, split, full = buffer[at : at + ITEM].tolist()
                assert begin <= full_end <= end and begin <= full <= end and begin < end
                height = {0: 64, 1: 64, 2: 128}[kind]
                for packed in range(row0, min(row0 + height, rows_end)):
                    row, offset, limit, partial, own = buffer[pairs_at + packed // RATIO * PAIR :][:PAIR].tolist()
                    assert own <= full or own >= end, "all rows that see some see what is between"
                    if packed % RATIO == 0 and limit > begin and own < end:
                        partials.setdefault(row, []).append(partial + split)
                    token = np.arange(max(begin, own), min(end, limit))
                    slot = source + token
                    if source < 0:
                        slot = buffer[pages_at + ~source + token // PAGE] * PAGE + token % PAGE
                    seen.update([(row, offset, at_slot) for at_slot in slot.tolist()])
    return seen, partials


WINDOWS = (None, Window(20), Window(700), Window(5000), Window(256, chunked=True), Window(2048, chunked=True))


@pytest.mark.parametrize("window", WINDOWS)
def test_every_packed_row_meets_every_token_that_it_sees_once(window: Window | None) -> None:
    for seed in range(3):
        sequences = random_sequences(seed, 8, rows=(1, 1, 3, 20), chunk_tokens=(1, 15, 16, 17, 300, 2100))
        plan = sequences.plan()
        seen, partials = reads_of(buffer_of(plan, window))
        expected: Counter[tuple[int, int, int]] = Counter()
        row = 0
        for sequence in sequences.sequences:
            for own in range(sequence.rows):
                first = 0 if window is None else window.first(sequence.position + own)
                for chunk in sequence.chunks:
                    for token in range(max(0, first - chunk.start), chunk.tokens):
                        expected[row, chunk.offset, chunk.first_slot + token] += RATIO
                tail = sequence.position - sequence.tail_tokens
                for token in range(max(0, first - tail), sequence.tail_tokens + own + 1):
                    expected[row, 0, sequence.tail_pages[token // PAGE] * PAGE + token % PAGE] += RATIO
                row += 1
        assert seen == expected
        given = [partial for parts in partials.values() for partial in parts]
        assert len(given) == len(set(given))


def test_pages_that_no_row_sees_any_more_are_not_in_the_lists() -> None:
    """However long a tail is, what a window keeps of it fits buffers that hold the window."""
    size, window = 100_000, Window(1000)
    scattered = [page * 7 % 6000 + 1 for page in range(-(-size // PAGE))]
    for pages in (scattered, list(range(1, len(scattered) + 1))):
        kept = tuple([0] * (len(pages) - 66) + pages[-66:])  # given back
        tails = [StepSequence((), kept, size - rows, rows, size - rows) for rows in (1, 30)]
        for sequences in (tails[:1], tails[1:], tails):
            plan = plan_step(sequences, plan_levels(sequences, max_cascade_levels=3), page_size=PAGE)
            seen, _ = reads_of(buffer_of(plan, window, replace(LIMITS, pages=150)))
            assert {slot // PAGE for _, _, slot in seen} <= set(pages[-66:])
            assert sum(seen.values()) == RATIO * 1000 * sum(sequence.rows for sequence in sequences)


@pytest.mark.parametrize("window", WINDOWS)
def test_row_records_name_the_partials_of_the_row(window: Window | None) -> None:
    plan = random_sequences(3, 20, rows=(1, 5)).plan()
    buffer = buffer_of(plan, window)
    records = buffer[LIMITS.static_ints + HEADER :][: len(plan.slots) * ROW].reshape(-1, ROW).tolist()
    _, partials = reads_of(buffer)
    for row, (first, shared, tail_first, tails) in enumerate(records):
        assert sorted(partials[row]) == [*range(first, first + shared), *range(tail_first, tail_first + tails)]


def test_rows_see_from_where_the_window_says() -> None:
    positions = np.arange(0, 5000, 7, dtype=np.int32)
    for window in WINDOWS[1:]:
        assert window is not None
        seen = first_seen(window, positions)
        expected = [window.first(position) for position in positions.tolist()]
        assert seen is None if not any(expected) else seen is not None and seen.tolist() == expected


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
        tail_lists(plan, shared_lists(PairReads.of(plan.levels), len(plan.slots), shape), shape, PAGE)


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
