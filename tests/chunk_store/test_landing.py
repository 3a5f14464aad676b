"""Memory that data is read into: which bytes of which plane a piece is, and how it is cut."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from chunk_store.landing import Buffers, cut, ranges

SIZES = st.lists(st.integers(0, 9), max_size=6)


@given(SIZES, st.data())
def test_a_piece_is_its_bytes_of_each_plane(sizes: list[int], data: st.DataObject) -> None:
    planes = [bytearray(size) for size in sizes]
    landing = Buffers([memoryview(plane) for plane in planes])
    assert landing.sizes == tuple(sizes)
    start = data.draw(st.integers(0, sum(sizes)))
    nbytes = data.draw(st.integers(0, sum(sizes) - start))
    with landing.piece(start, nbytes) as views:
        number = 0
        for view in views:
            for at in range(view.nbytes):
                number += 1
                view[at] = number
    assert number == nbytes
    assert b"".join(planes) == bytes(start) + bytes(range(1, nbytes + 1)) + bytes(sum(sizes) - start - nbytes)
    starts = list(accumulate(sizes, initial=0))
    assert sum(last - first for _, first, last in ranges(starts, start, nbytes)) == nbytes


def test_views_are_cut_where_they_end_and_in_between() -> None:
    views = [memoryview(b"abcd"), memoryview(b""), memoryview(b"efghi")]
    assert [bytes(part) for part in cut(views, [4, 2, 3])] == [b"abcd", b"ef", b"ghi"]
    assert [bytes(part) for part in cut(views, [1, 3, 5])] == [b"a", b"bcd", b"efghi"]
    assert list(cut(views, [4, 0, 5])) == views and list(cut([], [])) == []
