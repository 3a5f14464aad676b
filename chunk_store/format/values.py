"""How data is cut for stores that hold values instead of files: of at most 2 MiB each, the header by itself.

    planes   |----- 3 MiB -----|-- 1 MiB --|--- 1.5 MiB ---|
    spans    |- 2 MiB -|1 MiB -|-- 1 MiB --|--- 1.5 MiB ---|      a plane's first span starts where the plane does
    values   |    0    |         1         |       2       |      spans in order, as many as fit

A span starts at a block's edge, so each value can be checked by itself. Part of the format: docs/store_format.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from chunk_store.errors import BlobBad, BlobMissing
from chunk_store.format.header import Frame, checksum, decode_header, split_blocks
from chunk_store.landing import cut

VALUE_NBYTES = 2 * 2**20


def values_of(views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The spans of each value, in file order."""
    value: list[memoryview] = []
    nbytes = 0
    for span in split_blocks(views, VALUE_NBYTES):
        if value and nbytes + span.nbytes > VALUE_NBYTES:
            yield value
            value, nbytes = [], 0
        value.append(span)
        nbytes += span.nbytes
    if value:
        yield value


def spans_of_values(sizes: Sequence[int]) -> list[list[int]]:
    """Bytes of each span of each value, for planes of ``sizes`` bytes."""
    values: list[list[int]] = []
    nbytes = 0
    for size in sizes:
        for start in range(0, size, VALUE_NBYTES):
            span = min(VALUE_NBYTES, size - start)
            if not values or nbytes + span > VALUE_NBYTES:
                values.append([])
                nbytes = 0
            values[-1].append(span)
            nbytes += span
    return values


def value_count(sizes: Sequence[int]) -> int:
    """How many values planes of ``sizes`` bytes have."""
    return len(spans_of_values(sizes))


@dataclass(frozen=True)
class Batch:
    """Values from number ``first`` on that are read together: bytes ``start .. start + nbytes`` of the data."""

    first: int
    start: int
    nbytes: int
    spans: Sequence[Sequence[int]]  # of each value, in bytes

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + len(self.spans))


def batches_of(sizes: Sequence[int], nbytes_max: int) -> list[Batch]:
    """All values in batches of at most ``nbytes_max`` bytes, or one larger value; one empty batch without any."""
    batches: list[Batch] = []
    first = start = nbytes = 0
    spans: list[list[int]] = []
    for value in spans_of_values(sizes):
        size = sum(value)
        if spans and nbytes + size > nbytes_max:
            batches.append(Batch(first, start, nbytes, spans))
            first, start, nbytes, spans = first + len(spans), start + nbytes, 0, []
        spans.append(value)
        nbytes += size
    return [*batches, Batch(first, start, nbytes, spans)]


def targets_of(views: Sequence[memoryview], batch: Batch) -> list[list[memoryview]]:
    """Where the spans of each value of ``batch`` go in ``views``, which are its memory."""
    pieces = cut(views, [span for value in batch.spans for span in value])
    return [list(islice(pieces, len(value))) for value in batch.spans]


def joined(spans: Sequence[memoryview | bytes]) -> memoryview | bytes:
    """A value as one buffer; copied only when it has several spans."""
    return spans[0] if len(spans) == 1 else b"".join(spans)


def scatter(value: memoryview, spans: Sequence[memoryview]) -> None:
    """Copies a value to where it belongs, if it has the right size."""
    if value.nbytes != sum(span.nbytes for span in spans):
        return
    at = 0
    for span in spans:
        span[:] = value[at : at + span.nbytes]
        at += span.nbytes


def check_value(spans: Sequence[memoryview], size: int | None, block_nbytes: int, checksums: Iterator[int]) -> None:
    """Compares each block of a value that was read with its checksum; ``size`` is what the value had.

    Raises ``BlobMissing``, ``BlobBad``.
    """
    wanted = sum(span.nbytes for span in spans)
    if size is None:
        raise BlobMissing("a value is gone")
    if size != wanted:
        raise BlobBad(f"a value has {size} bytes, expected {wanted}")
    if VALUE_NBYTES % block_nbytes:
        raise BlobBad(f"blocks of {block_nbytes} bytes do not fit values of {VALUE_NBYTES}")
    for block in split_blocks(spans, block_nbytes):
        if checksum(block) != next(checksums):
            raise BlobBad("a block does not match its checksum")


def framed(raw: bytes | memoryview) -> Frame:
    """A header kept by itself. Raises ``BlobBad``."""
    frame = decode_header(raw)
    if len(raw) != frame.data_offset:
        raise BlobBad(f"the header has {len(raw)} bytes, expected {frame.data_offset}")
    return frame
