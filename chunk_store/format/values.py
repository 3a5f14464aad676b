"""How data is cut for stores that hold values instead of files: pieces of at most 2 MiB, the header by itself.

    parts    |----- 3 MiB -----|-- 1 MiB --|--- 1.5 MiB ---|
    spans    |- 2 MiB -|1 MiB -|-- 1 MiB --|--- 1.5 MiB ---|      a part's first span starts where the part does
    pieces   |    0    |         1         |       2       |      spans in order, as many as fit

A span starts at a block's edge, so each piece can be checked by itself. Part of the format: docs/store_format.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from chunk_store.blobs import BlobBad, BlobMissing, BlobOtherVersion
from chunk_store.format.header import FormatError, Frame, OtherVersion, checksum, decode_header, split_blocks

PIECE_NBYTES = 2 * 2**20


def pieces_of(views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The spans of each piece, in file order."""
    piece: list[memoryview] = []
    nbytes = 0
    for span in split_blocks(views, PIECE_NBYTES):
        if piece and nbytes + span.nbytes > PIECE_NBYTES:
            yield piece
            piece, nbytes = [], 0
        piece.append(span)
        nbytes += span.nbytes
    if piece:
        yield piece


def piece_count(sizes: Sequence[int]) -> int:
    """How many pieces parts of ``sizes`` bytes have."""
    pieces = nbytes = 0
    for size in sizes:
        for start in range(0, size, PIECE_NBYTES):
            span = min(PIECE_NBYTES, size - start)
            if pieces == 0 or nbytes + span > PIECE_NBYTES:
                pieces, nbytes = pieces + 1, 0
            nbytes += span
    return pieces


def joined(spans: Sequence[memoryview | bytes]) -> memoryview | bytes:
    """A piece as one value; copied only when it has several spans."""
    return spans[0] if len(spans) == 1 else b"".join(spans)


def scatter(value: memoryview, spans: Sequence[memoryview]) -> None:
    """Copies a piece's value to where it belongs, if it has the right size."""
    if value.nbytes != sum(span.nbytes for span in spans):
        return
    at = 0
    for span in spans:
        span[:] = value[at : at + span.nbytes]
        at += span.nbytes


def check_piece(spans: Sequence[memoryview], size: int | None, block_nbytes: int, checksums: Iterator[int]) -> None:
    """Compares each block of a piece that was read with its checksum; ``size`` is what its value had.

    Raises ``BlobMissing``, ``BlobBad``.
    """
    wanted = sum(span.nbytes for span in spans)
    if size is None:
        raise BlobMissing("a piece is gone")
    if size != wanted:
        raise BlobBad(f"a piece has {size} bytes, expected {wanted}")
    if PIECE_NBYTES % block_nbytes:
        raise BlobBad(f"blocks of {block_nbytes} bytes do not fit pieces of {PIECE_NBYTES}")
    for block in split_blocks(spans, block_nbytes):
        if checksum(block) != next(checksums):
            raise BlobBad("a block does not match its checksum")


def framed(raw: bytes | memoryview) -> Frame:
    """A header kept by itself. Raises ``BlobBad``."""
    try:
        frame = decode_header(raw)
    except OtherVersion as error:
        raise BlobOtherVersion(str(error)) from error
    except FormatError as error:
        raise BlobBad(str(error)) from error
    if len(raw) != frame.data_offset:
        raise BlobBad(f"the header has {len(raw)} bytes, expected {frame.data_offset}")
    return frame
