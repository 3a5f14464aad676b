"""How data is cut for servers of values, and how a value that was read is checked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunk_store.errors import BlobBad, BlobMissing
from chunk_store.format.header import checksum, split_blocks
from chunk_store.format.values import VALUE_NBYTES, check_value, framed, joined, scatter, value_count, values_of
from tests.chunk_store.format.test_header import GOLDEN, HEADER_END


def test_values_are_cut_as_documented() -> None:
    mib = 2**20
    parts = [memoryview(bytes(size)) for size in (3 * mib, mib, 3 * mib // 2, 0, 7)]
    cut = [[span.nbytes for span in value] for value in values_of(parts)]
    assert cut == [[2 * mib], [mib, mib], [3 * mib // 2, 7]]
    assert list(values_of([])) == []


@given(st.lists(st.integers(0, 3 * VALUE_NBYTES), max_size=6))
def test_sizes_alone_say_how_many_values_there_are(sizes: list[int]) -> None:
    views = [memoryview(bytearray(size)) for size in sizes]
    cut = list(values_of(views))
    assert value_count(sizes) == len(cut)
    assert all(sum(span.nbytes for span in value) <= VALUE_NBYTES for value in cut)
    assert sum(span.nbytes for value in cut for span in value) == sum(sizes)


def test_a_value_goes_back_to_where_it_belongs() -> None:
    raw = bytes(range(10))
    value = memoryview(joined([memoryview(raw)[:3], memoryview(raw)[3:]]))
    target = bytearray(10)
    scatter(value, [memoryview(target)[:4], memoryview(target)[4:]])
    assert target == raw
    scatter(value[:9], [memoryview(target)])  # of another size: left alone
    assert target == raw


@pytest.mark.parametrize(
    ("size", "flip", "block", "error"),
    [(8, 0, 4, None), (None, 0, 4, BlobMissing), (7, 0, 4, BlobBad), (8, 1, 4, BlobBad), (8, 0, 3, BlobBad)],
)
def test_each_block_of_a_value_is_checked(
    size: int | None, flip: int, block: int, error: type[Exception] | None
) -> None:
    value = bytearray(b"abcdefgh")
    sums = [checksum(part) for part in split_blocks([memoryview(value)], block)]
    value[5] ^= flip
    if error is None:
        check_value([memoryview(value)], size, block, iter(sums))
        return
    with pytest.raises(error):
        check_value([memoryview(value)], size, block, iter(sums))


def test_a_header_kept_by_itself_has_its_size() -> None:
    raw = GOLDEN.read_bytes()[:4096]
    assert framed(raw).data_offset == 4096 > HEADER_END
    for wrong in (raw[:HEADER_END], raw + b"\0"):
        with pytest.raises(BlobBad, match="bytes, expected 4096"):
            framed(wrong)
