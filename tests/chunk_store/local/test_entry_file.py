"""One entry as one file: what is written is what is read, in calls of bounded size, and checked block by block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunk_store.errors import BlobBad
from chunk_store.format.header import BLOCK_NBYTES
from chunk_store.local import entry_file
from chunk_store.local.entry_file import (
    BATCH_NBYTES,
    SharedSpans,
    batches_of,
    check_headroom,
    read_data,
    read_frame,
    spans_of,
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
    read_data(opened, frame, spans_of(frame, [memoryview(plane) for plane in planes]))
    assert [bytes(plane) for plane in planes] == golden_parts()
    os.pwrite(opened, b"\xff", frame.data_offset + frame.sizes[0])
    with pytest.raises(BlobBad, match=f"block 1 of {len(frame.checksums)}"):
        read_data(opened, frame, spans_of(frame, [memoryview(plane) for plane in planes]))
    os.truncate(opened, frame.data_offset + 1)
    with pytest.raises(BlobBad, match="ended early"):
        read_data(opened, frame, spans_of(frame, [memoryview(plane) for plane in planes]))


def test_one_call_moves_about_a_mebibyte() -> None:
    views = [memoryview(bytearray(size)) for size in (5, 3 * BATCH_NBYTES, 0, BLOCK_NBYTES)]
    batches = list(batches_of(views, BLOCK_NBYTES))
    assert all(sum(view.nbytes for view in batch) <= BATCH_NBYTES for batch in batches)
    assert sum(view.nbytes for batch in batches for view in batch) == sum(view.nbytes for view in views)


def test_spans_are_taken_once_each_by_several_readers() -> None:
    shared = SharedSpans([])
    assert list(shared) == []
    spans = [entry_file.Span([], number, 0, 0) for number in range(5)]
    shared = SharedSpans(spans)
    one, two = iter(shared), iter(shared)
    assert [next(one).offset, next(two).offset, next(one).offset] == [0, 1, 2]
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
