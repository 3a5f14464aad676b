"""How data is cut for stores that hold values instead of files: pieces of at most 2 MiB, the header by itself.

    parts    |----- 3 MiB -----|-- 1 MiB --|--- 1.5 MiB ---|
    spans    |- 2 MiB -|1 MiB -|-- 1 MiB --|--- 1.5 MiB ---|      a part's first span starts where the part does
    pieces   |    0    |         1         |       2       |      spans in order, as many as fit

A span starts at a block's edge, so each piece can be checked by itself. Part of the format: docs/store_format.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from chunk_store.blobs import BlobBad
from chunk_store.header import FormatError, Frame, checksum, decode_header, split_blocks

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


def joined(spans: Sequence[memoryview]) -> memoryview | bytes:
    """A piece as one value; copied only when it has several spans."""
    return spans[0] if len(spans) == 1 else b"".join(spans)


def fill(spans: Sequence[memoryview], raw: bytes | memoryview, block_nbytes: int, checksums: Iterator[int]) -> None:
    """Copies a piece to where it belongs, each block compared with its checksum first. Raises ``BlobBad``."""
    source = memoryview(raw)
    wanted = sum(span.nbytes for span in spans)
    if source.nbytes != wanted:
        raise BlobBad(f"a piece has {source.nbytes} bytes, expected {wanted}")
    if PIECE_NBYTES % block_nbytes:
        raise BlobBad(f"blocks of {block_nbytes} bytes do not fit pieces of {PIECE_NBYTES}")
    at = 0
    for block in split_blocks(spans, block_nbytes):
        part = source[at : at + block.nbytes]
        if checksum(part) != next(checksums):
            raise BlobBad("a block does not match its checksum")
        block[:] = part
        at += block.nbytes


def framed(raw: bytes | memoryview) -> Frame:
    """A header kept by itself. Raises ``BlobBad``."""
    try:
        frame = decode_header(raw)
    except FormatError as error:
        raise BlobBad(str(error)) from error
    if len(raw) != frame.data_offset:
        raise BlobBad(f"the header has {len(raw)} bytes, expected {frame.data_offset}")
    return frame
