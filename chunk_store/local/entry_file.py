"""One entry as one file: its header, and pieces of its data, read span by span and checked in the cache."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from chunk_store.errors import BlobBad
from chunk_store.format.header import ALIGN_NBYTES, Frame, checksum, decode_header, fields_end
from chunk_store.landing import Landing, cut

BATCH_NBYTES = 8 * 2**20  # a call gives the interpreter away and waits for it: with many threads few calls are best
BATCH_VIEWS_MAX = 512
INDEX_HEADROOM_NBYTES = 8 * 2**20  # what data leaves free on the disk: a full index could not even evict


@dataclass(frozen=True)
class Piece:
    """Consecutive blocks that land together: bytes ``start .. start + nbytes`` of the data."""

    start: int
    nbytes: int
    first_block: int
    blocks: list[int]  # bytes of each


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


class SharedPieces:
    """Pieces that several threads take one after another."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = deque(pieces)

    def clear(self) -> None:
        """Leaves nothing to take."""
        self._pieces.clear()

    def __iter__(self) -> Iterator[Piece]:
        while True:
            try:
                yield self._pieces.popleft()  # atomic
            except IndexError:
                return


@lru_cache(maxsize=64)  # entries of equal length and layout are cut alike
def pieces_of(sizes: tuple[int, ...], block_nbytes: int, piece_nbytes: int) -> tuple[Piece, ...]:
    """Planes of ``sizes`` bytes in pieces of whole blocks: at most ``piece_nbytes`` each, or one larger block."""
    pieces: list[Piece] = []
    blocks: list[int] = []
    start = nbytes = number = 0
    for size in sizes:
        for at in range(0, size, block_nbytes):
            block = min(block_nbytes, size - at)
            if blocks and nbytes + block > piece_nbytes:
                pieces.append(Piece(start, nbytes, number - len(blocks), blocks))
                start, nbytes, blocks = start + nbytes, 0, []
            blocks.append(block)
            nbytes += block
            number += 1
    if blocks:
        pieces.append(Piece(start, nbytes, number - len(blocks), blocks))
    return tuple(pieces)


def read_data(fd: int, frame: Frame, landing: Landing, pieces: Iterable[Piece]) -> None:
    """Reads span by span and checks each block while it is still in the processor's cache."""
    for piece in pieces:
        with landing.piece(piece.start, piece.nbytes) as views:
            offset, index = frame.data_offset + piece.start, piece.first_block
            for batch in batches_of(cut(views, piece.blocks)):
                nbytes = sum(block.nbytes for block in batch)
                if os.preadv(fd, batch, offset) != nbytes:
                    raise BlobBad("the file ended early")
                offset += nbytes
                for block in batch:
                    if checksum(block) != frame.checksums[index]:
                        raise BlobBad(f"block {index} of {len(frame.checksums)} does not match its checksum")
                    index += 1


def batches_of(blocks: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """Blocks in file order, gathered so that one system call moves about ``BATCH_NBYTES``."""
    batch: list[memoryview] = []
    nbytes = 0
    for block in blocks:
        if batch and (nbytes + block.nbytes > BATCH_NBYTES or len(batch) == BATCH_VIEWS_MAX):
            yield batch
            batch, nbytes = [], 0
        batch.append(block)
        nbytes += block.nbytes
    if batch:
        yield batch


class BatchHashing:
    """Checksums of the blocks of ``batches``, computed by whoever is free."""

    def __init__(self, batches: Sequence[list[memoryview]]) -> None:
        self._left = deque(enumerate(batches))
        self._found: list[list[int]] = [[]] * len(batches)

    def run(self) -> None:
        """Hashes until nothing is left to begin."""
        while True:
            try:
                number, batch = self._left.popleft()  # atomic
            except IndexError:
                return
            self._found[number] = [checksum(block) for block in batch]

    def stop(self) -> None:
        """Leaves nothing to begin."""
        self._left.clear()

    def checksums(self) -> list[int]:
        """Of all blocks in order, when every ``run`` has ended."""
        return [found for batch in self._found for found in batch]


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
