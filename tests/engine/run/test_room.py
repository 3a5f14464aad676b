"""What one packed step can take: rows, partial results, tokens read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.run.room import StepRoom

SPLITS = ((0, 4), (9, 8))  # of chunks up to 8 tokens, and longer ones


def test_rows_are_given_until_none_is_left() -> None:
    room = StepRoom(10)
    room.grant([100], 5)
    assert [room.take([], 0, rows) for rows in (4, 3, 9, 1)] == [4, 3, 2, 0]


def test_a_row_has_a_partial_result_for_each_split() -> None:
    room = StepRoom(100, partials=30, chunk_splits=SPLITS, tail_split=4)
    room.grant([8, 9], 3)  # 2 and 2 splits of chunks, 1 of the tail
    assert room.partials == 25
    assert room.take([8], 0, 4) == 4 and room.partials == 25 - 4 * 3
    assert room.take([8], 4, 9) == 2, "13 are left, 9 rows would have 6 each"


def test_slices_stop_at_what_they_read_and_rows_that_decode_do_not() -> None:
    room = StepRoom(100, reads=100)
    for _ in range(8):
        room.grant([1000], 5)
    assert room.take([40], 0, 9) == 2 and room.take([40], 0, 1) == 0


def test_the_first_slice_always_gets_a_row() -> None:
    room = StepRoom(4, partials=3, reads=10, tail_split=1)
    for _ in range(3):
        room.grant([], 7)
    assert room.take([1 << 20], 99, 7) == 1
    assert room.take([], 0, 1) == 0
    full = StepRoom(1)
    full.grant([], 0)
    assert full.take([], 0, 1) == 0, "no row is left at all"


@given(
    rows=st.integers(1, 64),
    partials=st.integers(0, 400),
    reads=st.integers(0, 4000),
    asked=st.lists(st.tuples(st.lists(st.integers(1, 40), max_size=3), st.integers(0, 60), st.integers(1, 80))),
)
def test_no_more_is_taken_than_there_is(
    rows: int, partials: int, reads: int, asked: list[tuple[list[int], int, int]]
) -> None:
    room = StepRoom(rows, partials=partials, reads=reads, chunk_splits=SPLITS, tail_split=16)
    taken = [(context, before, room.take(context, before, wanted)) for context, before, wanted in asked]
    assert sum(count for _, _, count in taken) <= rows
    assert all(count <= wanted for (_, _, count), (_, _, wanted) in zip(taken, asked, strict=True))
    if any(count > 1 for _, _, count in taken[:1]) or not taken:
        seen = sum(count * (sum(context) + before) + count * (count + 1) // 2 for context, before, count in taken)
        assert seen <= reads and room.partials >= 0
