"""One entry as one file: what is written is what is read, in calls of bounded size, and checked block by block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given as given_cases
from hypothesis import strategies as st

from chunk_store.errors import BlobBad
from chunk_store.format.header import BLOCK_NBYTES, split_blocks
from chunk_store.landing import Buffers, cut
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.local import entry_file
from chunk_store.local.entry_file import (
    BATCH_NBYTES,
    SharedPieces,
    batches_of,
    check_headroom,
    pieces_of,
    read_data,
    read_frame,
    write_all,
)
from tests.chunk_store.format.test_header import GOLDEN, HEADER, golden_parts


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "entry"
    path.write_bytes(GOLDEN.read_bytes())
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def test_a_whole_file_has_a_frame_and_a_cut_or_longer_one_has_none(opened: int) -> None:
    assert read_frame(opened).header == HEADER
    size = os.fstat(opened).st_size
    for wrong in (size - 1, size + 1):
        os.truncate(opened, wrong)
        with pytest.raises(BlobBad, match=f"the file has {wrong} bytes"):
            read_frame(opened)


def test_each_block_is_checked_as_it_is_read(opened: int) -> None:
    frame = read_frame(opened)
    planes = [bytearray(size) for size in frame.sizes]
    landing = Buffers([memoryview(plane) for plane in planes])
    read_data(opened, frame, landing, pieces_of(frame.sizes, frame.block_nbytes, 100))
    assert [bytes(plane) for plane in planes] == golden_parts()
    os.pwrite(opened, b"\xff", frame.data_offset + frame.sizes[0])
    with pytest.raises(BlobBad, match=f"block 1 of {len(frame.checksums)}"):
        read_data(opened, frame, landing, pieces_of(frame.sizes, frame.block_nbytes, 100))
    os.truncate(opened, frame.data_offset + 1)
    with pytest.raises(BlobBad, match="ended early"):
        read_data(opened, frame, landing, pieces_of(frame.sizes, frame.block_nbytes, 100))


def test_one_call_moves_a_bounded_number_of_bytes() -> None:
    views = [memoryview(bytearray(size)) for size in (5, 3 * BATCH_NBYTES, 0, BLOCK_NBYTES)]
    batches = list(batches_of(split_blocks(views, BLOCK_NBYTES)))
    assert all(sum(view.nbytes for view in batch) <= BATCH_NBYTES for batch in batches)
    assert sum(view.nbytes for batch in batches for view in batch) == sum(view.nbytes for view in views)


@given_cases(
    layers=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)), max_size=4),
    tokens=st.integers(1, 9),
    block_nbytes=st.integers(1, 60),
    piece_nbytes=st.integers(1, 300),
)
def test_pieces_are_whole_blocks_and_cover_the_data(
    layers: list[tuple[int, int, int]], tokens: int, block_nbytes: int, piece_nbytes: int
) -> None:
    sizes = tuple(KVLayout("float16", tuple(LayerLayout(*layer) for layer in layers)).plane_nbytes(tokens))
    pieces = pieces_of(sizes, block_nbytes, piece_nbytes)
    assert [piece.start for piece in pieces] == list(accumulate((p.nbytes for p in pieces), initial=0))[:-1]
    assert sum(piece.nbytes for piece in pieces) == sum(sizes)
    assert all(piece.nbytes == sum(piece.blocks) for piece in pieces)
    assert all(piece.nbytes <= piece_nbytes or len(piece.blocks) == 1 for piece in pieces)
    assert [piece.first_block for piece in pieces] == list(accumulate((len(p.blocks) for p in pieces), initial=0))[:-1]
    views = [memoryview(bytearray(size)) for size in sizes]
    found = []
    for piece in pieces:
        with Buffers(views).piece(piece.start, piece.nbytes) as given:
            found += [block.nbytes for block in cut(given, piece.blocks)]
    assert found == [block.nbytes for block in split_blocks(views, block_nbytes)]


def test_pieces_are_taken_once_each_by_several_readers() -> None:
    shared = SharedPieces([])
    assert list(shared) == []
    shared = SharedPieces([entry_file.Piece(number, 0, 0, []) for number in range(5)])
    one, two = iter(shared), iter(shared)
    assert [next(one).start, next(two).start, next(one).start] == [0, 1, 2]
    shared.clear()
    assert list(shared) == []


def test_a_write_that_is_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: real(fd, [views[0][:3]], at))
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    assert write_all(fd, [memoryview(b"abcdefgh"), memoryview(b"ij")], 4) == 14
    os.close(fd)
    assert (tmp_path / "out").read_bytes() == b"\0\0\0\0abcdefghij"


def test_room_is_left_for_the_index(opened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_headroom(opened)
    monkeypatch.setattr(entry_file, "INDEX_HEADROOM_NBYTES", 2**62)
    with pytest.raises(OSError, match="left for the index"):
        check_headroom(opened)
