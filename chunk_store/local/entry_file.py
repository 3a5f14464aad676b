"""One entry as one file: its header, and spans of its data that one system call moves, checked in the cache."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from chunk_store.errors import BlobBad
from chunk_store.format.header import ALIGN_NBYTES, Frame, checksum, decode_header, fields_end, split_blocks

BATCH_NBYTES = 1024 * 1024
BATCH_VIEWS_MAX = 512
INDEX_HEADROOM_NBYTES = 8 * 2**20  # what data leaves free on the disk: a full index could not even evict


@dataclass(frozen=True)
class Span:
    """Consecutive blocks that one system call reads."""

    blocks: list[memoryview]
    offset: int
    nbytes: int
    first_block: int


def read_frame(fd: int) -> Frame:
    raw = os.pread(fd, ALIGN_NBYTES, 0)
    end = fields_end(raw)
    if end > len(raw):
        raw += os.pread(fd, end - len(raw), len(raw))
    frame = decode_header(raw)
    size = os.fstat(fd).st_size
    if size != frame.stored_nbytes:
        raise BlobBad(f"the file has {size} bytes, its header says {frame.stored_nbytes}")
    return frame


class SharedSpans:
    """Spans that several threads take one after another."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = deque(spans)

    def clear(self) -> None:
        """Leaves nothing to take."""
        self._spans.clear()

    def __iter__(self) -> Iterator[Span]:
        while True:
            try:
                yield self._spans.popleft()  # atomic
            except IndexError:
                return


def read_data(fd: int, frame: Frame, spans: Iterable[Span]) -> None:
    """Reads span by span and checks each block while it is still in the processor's cache."""
    for span in spans:
        if os.preadv(fd, span.blocks, span.offset) != span.nbytes:
            raise BlobBad("the file ended early")
        for index, block in enumerate(span.blocks, span.first_block):
            if checksum(block) != frame.checksums[index]:
                raise BlobBad(f"block {index} of {len(frame.checksums)} does not match its checksum")


def spans_of(frame: Frame, views: Sequence[memoryview]) -> list[Span]:
    spans, offset, first_block = [], frame.data_offset, 0
    for blocks in batches_of(views, frame.block_nbytes):
        nbytes = sum(block.nbytes for block in blocks)
        spans.append(Span(blocks, offset, nbytes, first_block))
        offset += nbytes
        first_block += len(blocks)
    return spans


def batches_of(views: Sequence[memoryview], block_nbytes: int) -> Iterator[list[memoryview]]:
    """Blocks in file order, gathered so that one system call moves about ``BATCH_NBYTES``."""
    batch: list[memoryview] = []
    nbytes = 0
    for block in split_blocks(views, block_nbytes):
        if batch and (nbytes + block.nbytes > BATCH_NBYTES or len(batch) == BATCH_VIEWS_MAX):
            yield batch
            batch, nbytes = [], 0
        batch.append(block)
        nbytes += block.nbytes
    if batch:
        yield batch


def write_all(fd: int, views: list[memoryview], offset: int) -> int:
    """Writes all of ``views``; returns the offset behind them."""
    while views:
        written = os.pwritev(fd, views, offset)
        offset += written
        while views and written >= views[0].nbytes:
            written -= views[0].nbytes
            views = views[1:]
        if views and written:
            views = [views[0][written:], *views[1:]]
    return offset


def check_headroom(fd: int) -> None:
    disk = os.fstatvfs(fd)
    if disk.f_bavail * disk.f_frsize < INDEX_HEADROOM_NBYTES:
        raise OSError(errno.ENOSPC, f"less than {INDEX_HEADROOM_NBYTES} bytes would be left for the index")


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
